import numpy as np
import pytest

from nexus_cli.core.router.unit_choice import choose_units, share_of_best

EXPERTS, WIDTH = 8, 12


@pytest.mark.parametrize("seed", range(10))
def test_the_chosen_units_are_those_of_a_full_sort(seed):
    rng = np.random.default_rng(seed)
    contribution = rng.exponential(size=(EXPERTS, WIDTH)).astype(np.float32)
    experts = [int(e) for e in rng.permutation(EXPERTS)[: rng.integers(1, EXPERTS)]]
    count = int(rng.integers(1, len(experts) * WIDTH + 5))
    pairs = [(e, u) for e in experts for u in range(WIDTH)]
    best = sorted(pairs, key=lambda pair: -contribution[pair])[:count]
    found = choose_units(contribution, experts, count)
    assert {(e, int(u)) for e, units in found.units.items() for u in units} == set(best)
    share = sum(contribution[p] for p in best) / contribution.sum()
    assert found.share == pytest.approx(share)
    assert share_of_best(contribution, experts, count) == pytest.approx(share)


def test_a_planted_unit_is_always_taken_and_a_dead_one_only_when_all_are():
    rng = np.random.default_rng(0)
    contribution = rng.random((EXPERTS, WIDTH))
    contribution[5, 7], contribution[5, 3] = 100, 0
    assert 7 in choose_units(contribution, [5], 1).units[5]
    assert 3 not in choose_units(contribution, [5], WIDTH - 1).units[5]
    assert 3 in choose_units(contribution, [5], 10 * WIDTH).units[5]


def test_equal_units_are_taken_in_the_order_of_the_experts():
    found = choose_units(np.ones((EXPERTS, WIDTH)), [6, 2], WIDTH + 2)
    assert found.units[6].tolist() == list(range(WIDTH))
    assert found.units[2].tolist() == [0, 1]


def test_units_that_never_acted_can_be_chosen_from():
    assert choose_units(np.zeros((EXPERTS, WIDTH)), [1], 3).share == 0
    assert share_of_best(np.zeros((EXPERTS, WIDTH)), [1], 3) == 0


@pytest.mark.parametrize(("experts", "count"), [([], 3), ([8], 3), ([-1], 3), ([1], 0)])
def test_an_impossible_choice_is_refused(experts, count):
    with pytest.raises(ValueError, match="cannot choose"):
        choose_units(np.ones((EXPERTS, WIDTH)), experts, count)
