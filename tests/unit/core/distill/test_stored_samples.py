"""A store's samples of the tail stand in for it, on average exactly."""

import numpy as np
import pytest

from nexus_cli.core.distill.store_teacher import with_samples
from nexus_cli.io.teacher_store.rows import Kept

# Shape letters: M positions, K kept entries, D samples, V vocabulary.


def kept_with(samples_MD, tail=0.25):
    num = len(samples_MD)
    return Kept(
        ids_MK=np.tile(np.array([7, 3], np.int32), (num, 1)),
        logprobs_MK=np.tile(np.log(np.array([0.5, 0.25], np.float32)), (num, 1)),
        tails_MT=np.full((num, 3), np.log(tail), np.float32),
        nll_M=np.zeros(num, np.float32),
        tail_samples_MD=np.array(samples_MD, np.int32),
    )


def as_mapping(ids_X, logprobs_X):
    return {int(i): float(np.exp(x)) for i, x in zip(ids_X, logprobs_X, strict=True) if x > -np.inf}


def test_each_sample_has_its_share_and_a_repeated_one_is_one_entry():
    ids_MX, logprobs_MX = with_samples(kept_with([[9, 4, 9, 9], [1, 2, 5, 6]]))
    assert as_mapping(ids_MX[0], logprobs_MX[0]) == pytest.approx(
        {7: 0.5, 3: 0.25, 4: 0.25 / 4, 9: 0.75 / 4}
    )
    assert as_mapping(ids_MX[1], logprobs_MX[1]) == pytest.approx(
        {7: 0.5, 3: 0.25, 1: 1 / 16, 2: 1 / 16, 5: 1 / 16, 6: 1 / 16}
    )
    np.testing.assert_allclose(np.exp(logprobs_MX).sum(1), 1, rtol=1e-6)


def test_a_position_without_a_tail_has_its_entries_alone():
    ids_MX, logprobs_MX = with_samples(kept_with([[-1, -1]], tail=1e-30))
    assert as_mapping(ids_MX[0], logprobs_MX[0]) == pytest.approx({7: 0.5, 3: 0.25})


def test_the_mean_over_draws_is_the_distribution():
    rng = np.random.default_rng(0)
    tail_V = np.zeros(12)
    tail_V[[0, 1, 2, 5, 8]] = [0.1, 0.05, 0.04, 0.03, 0.03]
    drawn_MD = rng.choice(12, (20_000, 4), p=tail_V / tail_V.sum())
    ids_MX, logprobs_MX = with_samples(kept_with(drawn_MD, tail=tail_V.sum()))
    mean_V = np.bincount(ids_MX.ravel(), np.exp(logprobs_MX.astype(float)).ravel(), 12) / 20_000
    np.testing.assert_allclose(mean_V[[7, 3]], [0.5, 0.25], rtol=1e-6)
    mean_V[[7, 3]] = 0
    np.testing.assert_allclose(mean_V, tail_V, atol=4e-3)


def test_a_store_without_samples_is_refused():
    kept = kept_with([[1]])
    bare = Kept(kept.ids_MK, kept.logprobs_MK, kept.tails_MT, kept.nll_M)
    with pytest.raises(ValueError, match="no samples"):
        with_samples(bare)
