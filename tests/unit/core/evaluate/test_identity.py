"""The identity check sees any difference, and leaves the model as it was."""

from __future__ import annotations

import math

import torch
from torch import nn

from nexus_cli.core.evaluate.identity import difference, gates_at_zero, routers_of, same_routers


class Layer(nn.Module):
    def __init__(self, gate: float, router: float) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.shared_expert = nn.Module()
        self.mlp.shared_expert.output_gate = nn.Parameter(torch.full((1,), gate))
        self.mlp.router = nn.Module()
        self.mlp.router.weight = nn.Parameter(torch.full((2, 2), router))


class Model(nn.Module):
    def __init__(self, gate: float = 0.5, router: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(gate, router)])


def test_equal_states_do_not_differ_and_one_bit_does() -> None:
    one = torch.randn(2, 3, 4)
    other = one.clone()
    head = torch.randn(5, 4)
    assert difference([one], [other], head, head).hidden == 0.0
    other[0, 1, 2] = torch.nextafter(other[0, 1, 2], torch.tensor(math.inf))
    assert difference([one], [other], head, head).hidden > 0.0


def test_another_head_is_seen_in_the_logits() -> None:
    states = torch.randn(1, 3, 4)
    head = torch.randn(5, 4)
    changed = head.clone()
    changed[2, 2] += 1
    found = difference([states], [states], head, changed)
    assert found.hidden == 0.0
    assert found.logit > 0.0


def test_nan_is_never_equal() -> None:
    states = torch.full((1, 1, 4), math.nan)
    head = torch.randn(5, 4)
    assert difference([states], [states], head, head).hidden == math.inf


def test_gates_are_zero_inside_the_block_only() -> None:
    model = Model(gate=0.5)
    gate = model.layers[0].mlp.shared_expert.output_gate
    with gates_at_zero(model):
        assert gate.item() == 0.0
    assert gate.item() == 0.5


def test_routers_are_borrowed_inside_the_block_only() -> None:
    model, base = Model(router=1.0), Model(router=2.0)
    assert not same_routers(model, base)
    with routers_of(model, base):
        assert same_routers(model, base)
    assert model.layers[0].mlp.router.weight[0, 0].item() == 1.0
