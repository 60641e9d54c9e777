import numpy as np
import pytest

from nexus_cli.io.teacher_store.id_planes import MAX_VOCABULARY, IdPlanes, VocabularyRanks
from nexus_cli.io.teacher_store.ragged import Ragged


def ranks_in_order(size):
    return VocabularyRanks(np.arange(size, dtype=np.int32))


def flat(values):
    return Ragged(np.array(values, np.uint8), np.array([0, len(values)]))


def test_the_commonest_token_has_rank_0_and_of_equals_the_lower_id():
    ranks = VocabularyRanks.by_count(np.array([1, 5, 0, 5, 1, 9]))
    assert ranks.id_V.tolist() == [5, 1, 3, 0, 4, 2]
    assert ranks.id_V.dtype == np.int32
    assert len(ranks) == 6


def test_a_rank_is_a_page_and_a_place_and_far_pages_lie_apart():
    ids_N = np.array([0, 255, 256, 65_279, 65_280, 65_535, 65_536, 201_087], np.int32)
    planes = ranks_in_order(201_088).planes(ids_N, np.array([0, 5, 5, 8]))
    assert planes.page.flat.tolist() == [0, 0, 1, 254, 255, 255, 255, 255]
    assert planes.low.flat.tolist() == [0, 255, 0, 255, 0, 255, 0, 127]
    # 201,087 = 256 * 785 + 127, and 785 - 255 = 530 = 2 * 256 + 18
    assert planes.far_low.flat.tolist() == [0, 0, 1, 18]
    assert planes.far_high.flat.tolist() == [0, 0, 0, 2]
    assert planes.low.splits.tolist() == [0, 5, 5, 8]
    assert planes.far_low.splits.tolist() == planes.far_high.splits.tolist() == [0, 1, 1, 4]


@pytest.mark.parametrize("size", [1, 50, 8_256, 65_281, 201_088, 400_000])
def test_ids_come_back_exactly(size):
    rng = np.random.default_rng(size)
    ranks = VocabularyRanks(rng.permutation(size).astype(np.int32))
    ids_N = np.concatenate([rng.integers(size, size=3_000), [0, size - 1]]).astype(np.int32)
    ends = [0, *np.sort(rng.integers(len(ids_N), size=5)), len(ids_N)]
    planes = ranks.planes(ids_N, np.array(ends))
    assert np.array_equal(ranks.ids(planes), ids_N)
    assert (len(planes.far_low.flat) > 100) == (size > 100_000)


def test_no_ids_are_planes_of_nothing():
    planes = ranks_in_order(50).planes(np.empty(0, np.int32), np.array([0, 0, 0]))
    assert planes.page.splits.tolist() == planes.far_high.splits.tolist() == [0, 0, 0]
    assert ranks_in_order(50).ids(planes).tolist() == []


@pytest.mark.parametrize(
    ("id_V", "complaint"),
    [
        (np.array([0, 2, 2], np.int32), "no permutation"),
        (np.array([1, 2, 3], np.int32), "no permutation"),
        (np.array([0, 1, 2], np.int64), "no permutation"),
        (np.empty(MAX_VOCABULARY + 1, np.int32), "holds 16842496"),
    ],
)
def test_a_table_that_is_no_order_of_the_vocabulary_is_refused(id_V, complaint):
    with pytest.raises(ValueError, match=complaint):
        VocabularyRanks(id_V)


@pytest.mark.parametrize(
    "planes",
    [
        IdPlanes(flat([0]), flat([50]), flat([]), flat([])),
        IdPlanes(flat([0, 0]), flat([1, 2, 3]), flat([]), flat([])),
        IdPlanes(flat([255, 255]), flat([1, 1]), flat([0]), flat([0])),
        IdPlanes(flat([0]), flat([1]), flat([0, 0]), flat([0, 0])),
    ],
    ids=["outside the vocabulary", "planes of two lengths", "too few far", "too many far"],
)
def test_planes_that_do_not_fit_are_refused(planes):
    size = 50 if planes.page.flat[0] == 0 else 70_000
    with pytest.raises(ValueError, match=r"vocabulary|fit|broadcast"):
        ranks_in_order(size).ids(planes)
