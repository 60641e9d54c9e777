import numpy as np
import pytest
import torch

from nexus_cli.core.kernels.routing import sort_by_expert
from nexus_cli.core.router.units import UnitAccumulator

EXPERTS, WIDTH = 8, 12


def rows(tokens=20, seed=0):
    """Activations of all routed rows, and the routing; the first and last tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(tokens, EXPERTS, generator=generator).topk(2).indices
    scores = torch.rand(tokens, 2, generator=generator)
    hidden = torch.randn(2 * tokens, WIDTH, generator=generator)
    return hidden, sort_by_expert(experts, EXPERTS), scores, torch.arange(1, tokens - 1)


def test_rows_all_at_once_and_expert_by_expert_count_alike():
    hidden, routing, scores, body = rows()
    norms = torch.rand(1, EXPERTS, WIDTH)
    whole, parts = (UnitAccumulator(np.zeros((1, EXPERTS, WIDTH)), norms) for _ in range(2))
    for accumulator in (whole, parts):
        accumulator.count(len(scores), body)
    whole.layer(0).see_rows(hidden, routing, scores)
    begin = 0
    for expert, end in enumerate(routing.offsets_E.tolist()):
        place = slice(begin, end)
        parts.layer(0).see_expert(expert, hidden[place], routing.slot_R[place].long(), scores)
        begin = end
    np.testing.assert_allclose(whole.contributions(), parts.contributions(), rtol=1e-6)
    assert whole.contributions().min() >= 0
    assert whole.contributions().sum() > 0


def test_a_run_that_goes_on_counts_what_one_run_counts_bit_for_bit():
    norms = torch.rand(1, EXPERTS, WIDTH)
    whole = UnitAccumulator(np.zeros((1, EXPERTS, WIDTH)), norms)
    before = np.zeros((1, EXPERTS, WIDTH))
    for seed in range(3):
        part = UnitAccumulator(before, norms)
        hidden, routing, scores, body = rows(seed=seed)
        for accumulator in (whole, part):
            accumulator.count(len(scores), body)
            accumulator.layer(0).see_rows(hidden, routing, scores)
        before = part.contributions()
    np.testing.assert_array_equal(before, whole.contributions())


def test_activations_that_are_not_finite_name_their_layer():
    hidden, routing, scores, body = rows()
    hidden[10] = float("nan")
    accumulator = UnitAccumulator(np.zeros((2, EXPERTS, WIDTH)), torch.ones(2, EXPERTS, WIDTH))
    accumulator.count(len(scores), body)
    accumulator.layer(1).see_rows(hidden, routing, scores)
    with pytest.raises(ValueError, match="experts of layer 1 produced NaN"):
        accumulator.contributions()
