"""What the sums of a text say: perplexities, and a paired difference with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus_cli.core.evaluate.perplexity import COLUMNS

# D documents   X columns of the sums   R resamples

RESAMPLES_AT_ONCE = 2**22  # numbers drawn in one go


@dataclass(frozen=True)
class Interval:
    """A mean, and the percentile bootstrap interval around it; ``None`` for one document."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Pair:
    """One measure of the baseline and of the model."""

    base: float
    model: float


@dataclass(frozen=True)
class TextResult:
    """A model against its baseline on one text.

    Attributes:
        documents: Documents with at least one scored token.
        tokens: Scored tokens.
        bytes: UTF-8 bytes that they spell.
        perplexity: ``exp(nll / tokens)``.
        bits_per_byte: ``nll / (bytes ln 2)``; comparable between tokenizers.
        delta_nll: Nats a token that the model is worse (positive) than the baseline.
        kl: Mean KL(baseline || model) a token, in nats.
        top1_agreement: Share of tokens where both put the same token first.
        router_agreement: Share of routed experts in common.
        value_tokens: Scored tokens of tool calls' argument values.
        value_perplexity: Perplexity of these alone; ``None`` where there are none.
    """

    documents: int
    tokens: int
    bytes: int
    perplexity: Pair
    bits_per_byte: Pair | None
    delta_nll: Interval
    kl: float
    top1_agreement: float
    router_agreement: float
    value_tokens: int
    value_perplexity: Pair | None


def summarise(
    sums_DX: NDArray[np.float64],
    bytes_D: NDArray[np.int64],
    *,
    resamples: int,
    level: float,
    seed: int,
) -> TextResult:
    """Reduce per-document sums to the figures of a report.

    Args:
        sums_DX: ``[D, X]``, X as in :data:`~nexus_cli.core.evaluate.perplexity.COLUMNS`.
        bytes_D: UTF-8 bytes that the scored tokens of each document spell.
        resamples: Bootstrap resamples.
        level: Coverage of the interval, such as 0.95.
        seed: Seed of the resampling.

    Raises:
        ValueError: If no token was scored.
    """
    has_tokens_D = sums_DX[:, COLUMNS.index("tokens")] > 0
    sums_DX, num_bytes = sums_DX[has_tokens_D], int(bytes_D[has_tokens_D].sum())
    if not len(sums_DX):
        raise ValueError("the text has no token to score")
    total = dict(zip(COLUMNS, sums_DX.sum(0).tolist(), strict=True))
    column = dict(zip(COLUMNS, sums_DX.T, strict=True))
    tokens = total["tokens"]
    delta = bootstrap(
        column["nll"] - column["base_nll"],
        column["tokens"],
        resamples=resamples,
        level=level,
        seed=seed,
    )
    return TextResult(
        documents=len(sums_DX),
        tokens=int(tokens),
        bytes=num_bytes,
        perplexity=_perplexity(total["base_nll"], total["nll"], tokens),
        bits_per_byte=_bits_per_byte(total["base_nll"], total["nll"], num_bytes),
        delta_nll=delta,
        kl=total["kl"] / tokens,
        top1_agreement=total["top1"] / tokens,
        router_agreement=total["routers"] / tokens,
        value_tokens=int(total["value_tokens"]),
        value_perplexity=(
            _perplexity(total["base_value_nll"], total["value_nll"], total["value_tokens"])
            if total["value_tokens"]
            else None
        ),
    )


def bootstrap(
    sums_D: NDArray[np.float64],
    counts_D: NDArray[np.float64],
    *,
    resamples: int,
    level: float,
    seed: int,
) -> Interval:
    """``sum(sums) / sum(counts)`` and its percentile interval over resampled documents.

    Documents, not tokens, are drawn: the tokens of one document are not independent.
    """
    mean = float(sums_D.sum() / counts_D.sum())
    size = len(sums_D)
    if size < 2:
        return Interval(mean, None, None)
    generator = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    at_once = max(1, RESAMPLES_AT_ONCE // size)
    for begin in range(0, resamples, at_once):
        drawn_RD = generator.integers(size, size=(min(at_once, resamples - begin), size))
        means.append(sums_D[drawn_RD].sum(1) / counts_D[drawn_RD].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _perplexity(base_nll: float, nll: float, tokens: float) -> Pair:
    return Pair(_exp(base_nll / tokens), _exp(nll / tokens))


def _exp(value: float) -> float:
    """``exp``, infinite where a float cannot hold it."""
    return math.exp(value) if value < 700 else math.inf


def _bits_per_byte(base_nll: float, nll: float, num_bytes: int) -> Pair | None:
    if not num_bytes:
        return None
    return Pair(base_nll / (num_bytes * math.log(2)), nll / (num_bytes * math.log(2)))
