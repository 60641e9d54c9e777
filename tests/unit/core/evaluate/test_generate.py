"""Choosing the next token."""

from __future__ import annotations

import pytest
import torch

from nexus_cli.core.evaluate.generate import Sampling, next_token

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))


def draw(sampling: Sampling, count: int = 4000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    drawn = [next_token(LOGITS, sampling, generator) for _ in range(count)]
    return [drawn.count(token) / count for token in range(4)]


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert draw(Sampling(temperature=0.0), 3) == [0, 1, 0, 0]


def test_temperature_one_draws_from_the_models_distribution() -> None:
    assert draw(Sampling(temperature=1.0)) == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.03)


def test_temperature_scales_the_logits() -> None:
    weights = [p**2 for p in (0.1, 0.5, 0.15, 0.25)]
    wanted = [w / sum(weights) for w in weights]
    assert draw(Sampling(temperature=0.5)) == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(0.5, {1}), (0.51, {1, 3}), (0.75, {1, 3}), (0.9, {1, 2, 3}), (1e-9, {1})],
)
def test_the_nucleus_is_the_smallest_set_with_enough_probability(
    top_p: float, nucleus: set[int]
) -> None:
    shares = draw(Sampling(top_p=top_p), 800)
    assert {token for token, share in enumerate(shares) if share} == nucleus
