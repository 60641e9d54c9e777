"""Figures of a report against their definitions, and the bootstrap against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nexus_cli.core.evaluate.compare import bootstrap, summarise
from nexus_cli.core.evaluate.perplexity import COLUMNS


def sums(**columns: list[float]) -> np.ndarray:
    size = len(columns["tokens"])
    return np.array([columns.get(name, [0.0] * size) for name in COLUMNS]).T


def test_perplexity_weighs_documents_by_their_tokens() -> None:
    found = summarise(
        sums(tokens=[1.0, 9.0, 0.0], nll=[5.0, 9.0, 0.0], base_nll=[4.0, 18.0, 0.0], kl=[1, 2, 0]),
        np.array([2, 40, 7]),
        resamples=100,
        level=0.95,
        seed=0,
    )
    assert found.documents == 2
    assert found.tokens == 10
    assert found.bytes == 42
    assert found.perplexity.model == pytest.approx(math.exp(1.4))
    assert found.perplexity.base == pytest.approx(math.exp(2.2))
    assert found.delta_nll.mean == pytest.approx(-0.8)
    assert found.kl == pytest.approx(0.3)
    assert found.bits_per_byte is not None
    assert found.bits_per_byte.model == pytest.approx(14 / 42 / math.log(2))
    assert found.value_perplexity is None


def test_argument_values_have_their_own_perplexity() -> None:
    found = summarise(
        sums(tokens=[4.0], value_tokens=[2.0], value_nll=[1.0], base_value_nll=[3.0]),
        np.array([0]),
        resamples=10,
        level=0.9,
        seed=0,
    )
    assert found.value_perplexity is not None
    assert found.value_perplexity.model == pytest.approx(math.exp(0.5))
    assert found.value_perplexity.base == pytest.approx(math.exp(1.5))
    assert found.bits_per_byte is None
    assert found.delta_nll.low is None


def test_a_text_without_scored_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        summarise(sums(tokens=[0.0]), np.array([0]), resamples=10, level=0.9, seed=0)


def test_the_interval_is_the_percentile_bootstrap_of_the_ratio() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 200, size=80).astype(float)
    total = counts * generator.normal(-0.02, 0.05, size=80)
    ours = bootstrap(total, counts, resamples=20_000, level=0.95, seed=1)
    theirs = stats.bootstrap(
        (total, counts),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        confidence_level=0.95,
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.mean == pytest.approx(total.sum() / counts.sum())
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        counts = generator.integers(50, 60, size=60).astype(float)
        total = counts * generator.normal(0.1, 0.3, size=60)
        found = bootstrap(total, counts, resamples=400, level=0.9, seed=seed)
        hits += found.low < 0.1 < found.high
    assert 0.82 < hits / 200 < 0.96


def test_the_same_seed_gives_the_same_interval() -> None:
    total, counts = np.arange(9.0), np.ones(9)
    again = [bootstrap(total, counts, resamples=50, level=0.9, seed=7) for _ in range(2)]
    assert again[0] == again[1]
