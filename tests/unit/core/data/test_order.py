import numpy as np
import pytest

from nexus_cli.core.data.order import mixture_order, shard, take_turns

MIXTURES = [[1], [1, 1], [0.7, 0.3], [5, 1, 1, 1], [0.9, 0.05, 0.03, 0.02], [1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("weights", MIXTURES)
def test_every_prefix_has_each_source_within_one_sample_of_its_share(weights):
    turns = take_turns(weights, 2000)
    counts = np.cumsum(turns[:, None] == np.arange(len(weights)), axis=0)
    share = np.arange(1, 2001)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - share).max() < 1


@pytest.mark.parametrize("weights", MIXTURES)
def test_an_epoch_of_a_source_is_each_of_its_blocks_once_and_epochs_differ(weights):
    sizes = [7, 11, 13, 17, 19, 23][: len(weights)]
    order = mixture_order(3, sizes, weights, 1500)
    first = 0
    for size in sizes:
        own = order[(order >= first) & (order < first + size)] - first
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert len(epochs) < 2 or not (epochs[0] == epochs[1]).all()
        first += size


@pytest.mark.parametrize("start", [0, 1, 7, 40, 399])
def test_an_order_resumed_is_the_rest_of_the_order(start):
    whole = mixture_order(1, [10, 3], [0.8, 0.2], 400)
    rest = mixture_order(1, [10, 3], [0.8, 0.2], 400 - start, start)
    assert (whole[start:] == rest).all()


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    args = ([50, 50], [1.0, 1.0], 100)
    assert (mixture_order(5, *args) == mixture_order(5, *args)).all()
    assert (mixture_order(5, *args) != mixture_order(6, *args)).any()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_the_ranks_of_a_step_together_take_the_same_samples_for_any_number_of_ranks(size):
    order = np.arange(240)
    batch = 12 // size
    ranks = [shard(order, rank, size, batch).reshape(-1, batch) for rank in range(size)]
    assert (np.concatenate(ranks, axis=1).reshape(-1) == order).all()


def test_samples_beyond_the_last_whole_batch_are_taken_once():
    order = np.arange(17)
    taken = np.concatenate([shard(order, rank, 3, 2) for rank in range(3)])
    assert sorted(taken) == list(range(17))


@pytest.mark.parametrize(
    ("sizes", "weights"), [([0, 3], [1, 1]), ([3], [1, 1]), ([3, 3], [1, 0]), ([], [])]
)
def test_a_mixture_that_cannot_be_served_is_refused(sizes, weights):
    with pytest.raises(ValueError, match=r"source|weight"):
        mixture_order(0, sizes, weights, 10)
