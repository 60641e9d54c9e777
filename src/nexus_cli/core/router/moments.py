"""Sums over tokens from which every statistic of the router follows, and their merging.

Nothing here grows with the number of tokens. Two ranks, or a run and its continuation after a
kill, merge by addition; the reservoir keeps the tokens with the smallest keys, so that what it
holds does not depend on the order or the split either.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: L layers, E experts, I expert width, N tokens, R tokens kept in the
# reservoir.

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # constants of SplitMix64 (Steele, Lea, Flood 2014)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class TokenSums:
    """Sums over one population of tokens.

    ``p`` is the softmax of the raw router logits over all E experts; the *applied weight* is
    the softmax over the top k logits, zero elsewhere: what the layer multiplies outputs with.

    Attributes:
        tokens: how many tokens were counted.
        probability_LE: sum of ``p`` ``[L, E]``, float64.
        outer_LEE: sum of ``p p^T`` ``[L, E, E]``, float64.
        top1_LE: tokens whose largest logit is the expert's ``[L, E]``, int64.
        topk_LE: tokens that are sent to the expert ``[L, E]``, int64.
        weight_LE: sum of applied weights ``[L, E]``, float64.
    """

    tokens: int
    probability_LE: NDArray[np.float64]
    outer_LEE: NDArray[np.float64]
    top1_LE: NDArray[np.int64]
    topk_LE: NDArray[np.int64]
    weight_LE: NDArray[np.float64]

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int) -> TokenSums:
        """The sums over no token."""
        shape = num_layers, num_experts
        return cls(
            tokens=0,
            probability_LE=np.zeros(shape),
            outer_LEE=np.zeros((*shape, num_experts)),
            top1_LE=np.zeros(shape, dtype=np.int64),
            topk_LE=np.zeros(shape, dtype=np.int64),
            weight_LE=np.zeros(shape),
        )

    def __add__(self, other: TokenSums) -> TokenSums:
        return TokenSums(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def mean(self) -> NDArray[np.float64]:
        """Mean of ``p`` ``[L, E]``.

        Raises:
            ValueError: if no token was counted.
        """
        if self.tokens < 1:
            raise ValueError("no token was counted")
        return self.probability_LE / self.tokens

    def covariance(self) -> NDArray[np.float64]:
        """Sample covariance of ``p`` (divisor ``tokens - 1``) ``[L, E, E]``.

        Raises:
            ValueError: if fewer than two tokens were counted.
        """
        if self.tokens < 2:
            raise ValueError(f"a covariance needs two tokens, not {self.tokens}")
        mean_LE = self.mean()
        centred_LEE = self.outer_LEE - self.tokens * (mean_LE[:, :, None] * mean_LE[:, None, :])
        symmetric_LEE: NDArray[np.float64] = centred_LEE + centred_LEE.transpose(0, 2, 1)
        return symmetric_LEE / (2 * (self.tokens - 1))

    def usage(self) -> NDArray[np.float64]:
        """Mean applied weight ``[L, E]``; sums to one in every layer.

        Raises:
            ValueError: if no token was counted.
        """
        if self.tokens < 1:
            raise ValueError("no token was counted")
        return self.weight_LE / self.tokens


@dataclass(frozen=True)
class Reservoir:
    """A uniform sample of tokens: those with the smallest keys.

    Attributes:
        capacity: most tokens it keeps.
        keys_R: ascending, uint64, distinct.
        probability_RLE: their ``p`` in all layers ``[R, L, E]``, float16.
    """

    capacity: int
    keys_R: NDArray[np.uint64]
    probability_RLE: NDArray[np.float16]

    @classmethod
    def empty(cls, capacity: int, num_layers: int, num_experts: int) -> Reservoir:
        """Nothing kept yet."""
        shape = 0, num_layers, num_experts
        return cls(capacity, np.empty(0, np.uint64), np.empty(shape, np.float16))

    def admits(self, keys_N: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Positions of the keys that may enter, so that the others need not be fetched."""
        if self.capacity == 0:
            return np.empty(0, dtype=np.intp)
        if len(self.keys_R) < self.capacity:
            smallest = np.argsort(keys_N, kind="stable")[: self.capacity]
            return np.sort(smallest)
        return np.flatnonzero(keys_N < self.keys_R[-1])

    def __add__(self, other: Reservoir) -> Reservoir:
        keys = np.concatenate([self.keys_R, other.keys_R])
        kept = np.argsort(keys, kind="stable")[: self.capacity]
        values = np.concatenate([self.probability_RLE, other.probability_RLE])
        return Reservoir(self.capacity, keys[kept], values[kept])


@dataclass(frozen=True)
class RouterMoments:
    """All router statistics of a run.

    Attributes:
        top_k: experts a token is sent to.
        body: every token but the first of its sequence.
        first: the first tokens, which attention sinks make unlike all others.
        reservoir: sample of ``body`` tokens.
        units_LEI: what every hidden unit contributed to ``body`` tokens
            (:mod:`~nexus_cli.core.router.units`), float64; ``None`` where that was not summed.
    """

    top_k: int
    body: TokenSums
    first: TokenSums
    reservoir: Reservoir
    units_LEI: NDArray[np.float64] | None = None

    @classmethod
    def zeros(
        cls,
        num_layers: int,
        num_experts: int,
        top_k: int,
        reservoir_size: int,
        width: int | None = None,
    ) -> RouterMoments:
        """The statistics of no token; with an expert's ``width``, of hidden units too."""
        return cls(
            top_k=top_k,
            body=TokenSums.zeros(num_layers, num_experts),
            first=TokenSums.zeros(num_layers, num_experts),
            reservoir=Reservoir.empty(reservoir_size, num_layers, num_experts),
            units_LEI=None if width is None else np.zeros((num_layers, num_experts, width)),
        )

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.body.probability_LE.shape[0])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.body.probability_LE.shape[1])

    def __add__(self, other: RouterMoments) -> RouterMoments:
        if (self.top_k, self.body.outer_LEE.shape) != (other.top_k, other.body.outer_LEE.shape):
            raise ValueError("these statistics are of routers of different shapes")
        mine, theirs = self.units_LEI, other.units_LEI
        if (mine is None) != (theirs is None):
            raise ValueError("only one of these statistics has sums over hidden units")
        return RouterMoments(
            top_k=self.top_k,
            body=self.body + other.body,
            first=self.first + other.first,
            reservoir=self.reservoir + other.reservoir,
            units_LEI=None if mine is None or theirs is None else mine + theirs,
        )


def token_keys(
    documents_N: NDArray[np.int64], positions_N: NDArray[np.int64], seed: int
) -> NDArray[np.uint64]:
    """Pseudo-random keys of tokens, a pure function of document, position and seed.

    Args:
        documents_N: index of each token's document, int64.
        positions_N: its position in the document, int64, below 2**32.
        seed: of the sample.

    Returns:
        uint64 ``[N]``; distinct tokens have distinct keys, because every step is a bijection.
    """
    token_N = (documents_N.astype(np.uint64) << np.uint64(32)) | positions_N.astype(np.uint64)
    offset = _mix(np.array([seed], dtype=np.uint64))
    return _mix(token_N ^ offset)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function; arrays wrap around silently, which is meant."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))
