"""The order of samples: a pure function of the seed, the mixture and the epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: N samples, K sources.


def mixture_order(
    seed: int,
    blocks_per_source: Sequence[int],
    weights: Sequence[float],
    num_samples: int,
    start: int = 0,
) -> NDArray[np.int64]:
    """Which block each sample is, over as many epochs of each source as it takes.

    Every source walks a fresh permutation of its blocks each epoch. Sources take turns so that
    after any ``n`` samples each has had its share of ``n`` to within one sample.

    Args:
        seed: of the permutations.
        blocks_per_source: blocks of each source; they lie one source after the other.
        weights: share of each source, relative to the others, positive.
        num_samples: how many samples to give.
        start: samples already taken: ``order(n)[k:] == order(n - k, start=k)``.

    Returns:
        Block indices, int64 ``[num_samples]``.

    Raises:
        ValueError: a source has no block, or a weight is not positive.
    """
    _check(blocks_per_source, weights)
    source_N = take_turns(weights, start + num_samples)
    first_K = np.concatenate([[0], np.cumsum(blocks_per_source)])
    order_N = np.empty(num_samples, dtype=np.int64)
    for source, size in enumerate(blocks_per_source):
        taken = int(np.count_nonzero(source_N[:start] == source))
        place_N = np.flatnonzero(source_N[start:] == source)
        order_N[place_N] = first_K[source] + _walk(seed, source, size, taken, len(place_N))
    return order_N


def take_turns(weights: Sequence[float], num_samples: int) -> NDArray[np.int64]:
    """Which source each sample is from, with every prefix within one sample of the weights.

    Tijdeman's rule (The chairman assignment problem, 1980): among the sources far enough behind
    their share, the one that would first be too far behind goes next.

    Args:
        weights: positive, one a source.
        num_samples: length of the result.

    Returns:
        Source indices, int64 ``[num_samples]``.
    """
    if len(weights) == 1:
        return np.zeros(num_samples, dtype=np.int64)
    total = float(sum(weights))
    shares = [weight / total for weight in weights]
    slack = 1 / (2 * len(shares) - 2)
    counts = [0] * len(shares)
    turns = np.empty(num_samples, dtype=np.int64)
    for place in range(num_samples):
        behind = [(place + 1) * share - n for share, n in zip(shares, counts, strict=True)]
        # Rounding may leave nobody quite far enough behind; then the furthest goes.
        enough = min(slack, max(behind))
        waiting = (i for i, gap in enumerate(behind) if gap >= enough)
        turn = min(waiting, key=lambda i: ((1 - slack - behind[i]) / shares[i], i))
        counts[turn] += 1
        turns[place] = turn
    return turns


def shard(order_N: NDArray[np.int64], rank: int, size: int, batch_size: int) -> NDArray[np.int64]:
    """The samples of one rank, in batches, such that the ranks' batches together are the order.

    Global batch ``i`` is ``order[i * size * batch_size:][:size * batch_size]``, and rank ``r``
    has its ``r``-th slice of ``batch_size``. So what a step learns from depends on
    ``size * batch_size`` alone. Samples beyond the last whole global batch go to the ranks in
    slices of ``batch_size`` as far as they last: some ranks may then have fewer.

    Args:
        order_N: block indices, as :func:`mixture_order` gives them.
        rank: this process, ``0 <= rank < size``.
        size: processes.
        batch_size: samples a process takes at once.
    """
    if not 0 <= rank < size or batch_size < 1:
        raise ValueError(f"rank {rank} of {size} with batches of {batch_size}")
    whole = len(order_N) // (size * batch_size) * (size * batch_size)
    mine = order_N[:whole].reshape(-1, size, batch_size)[:, rank].reshape(-1)
    rest = order_N[whole:][rank * batch_size : (rank + 1) * batch_size]
    return np.concatenate([mine, rest])


def _walk(seed: int, source: int, size: int, taken: int, count: int) -> NDArray[np.int64]:
    """The ``count`` next blocks of a source that has already given ``taken``."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    epochs = range(taken // size, (taken + count - 1) // size + 1)
    walked = [np.random.default_rng([seed, source, e]).permutation(size) for e in epochs]
    first = taken % size
    return np.concatenate(walked)[first : first + count].astype(np.int64)


def _check(blocks_per_source: Sequence[int], weights: Sequence[float]) -> None:
    if len(blocks_per_source) != len(weights) or not weights:
        raise ValueError(f"{len(blocks_per_source)} sources but {len(weights)} weights")
    if min(blocks_per_source) < 1:
        raise ValueError(f"a source has no block: {list(blocks_per_source)}")
    if min(weights) <= 0:
        raise ValueError(f"weights must be positive: {list(weights)}")
