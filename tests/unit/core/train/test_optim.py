"""AdamW's groups and clipping, against a hand-written update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nexus_cli.core.distill.schedule import Schedule
from nexus_cli.core.train.loop import scaled_rates
from nexus_cli.core.train.optim import (
    Rates,
    build_optimizer,
    clip_gradients,
    kind_of,
    set_rates,
)

LAYER = "model.layers.3.mlp."
NAMES = {
    "shared": LAYER + "shared_expert.up_proj.weight",
    "shared_bias": LAYER + "shared_expert.up_proj.bias",
    "gate": LAYER + "shared_expert.output_gate",
    "router": LAYER + "router.weight",
    "router_bias": LAYER + "router.bias",
}
RATES = Rates(shared=0.1, gate=0.2, router=0.3, router_bias=0.4)


def parameters():
    torch.manual_seed(0)
    named = {name: nn.Parameter(torch.randn(3, 2)) for name in NAMES.values()}
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    return named


def test_every_trainable_tensor_has_its_kind_and_no_other_has_one():
    assert {kind: kind_of(name) for kind, name in NAMES.items()} == {kind: kind for kind in NAMES}
    for name in ("model.norm.weight", LAYER + "experts.down_proj_bias", "lm_head.weight"):
        with pytest.raises(ValueError, match="not a tensor that Nexus trains"):
            kind_of(name)


def test_one_step_is_adamw_with_decay_on_matrices_alone():
    named = parameters()
    before = {name: p.detach().double().clone() for name, p in named.items()}
    optimizer = build_optimizer(named, weight_decay=0.5, betas=(0.9, 0.99), epsilon=1e-8)
    set_rates(optimizer, RATES)
    optimizer.step()
    for kind, name in NAMES.items():
        rate = RATES.of(kind)
        decay = 0.5 if kind in ("shared", "router") else 0.0
        gradient = named[name].grad.double()
        m, v = 0.1 * gradient / (1 - 0.9), 0.01 * gradient**2 / (1 - 0.99)
        expected = before[name] * (1 - rate * decay) - rate * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(named[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_rate_of_zero_leaves_a_group_bit_for_bit():
    named = parameters()
    frozen = named[NAMES["router_bias"]].detach().clone()
    optimizer = build_optimizer(named, weight_decay=0.5)
    for _ in range(3):
        set_rates(optimizer, Rates(0.1, 0.1, 0.1, 0.0))
        optimizer.step()
    assert torch.equal(named[NAMES["router_bias"]], frozen)


def test_the_norm_is_that_of_all_moving_gradients_and_clipping_scales_them_to_it():
    named = parameters()
    optimizer = build_optimizer(named, weight_decay=0.0)
    set_rates(optimizer, Rates(0.1, 0.1, 0.1, 0.0))
    moving = [p.grad for name, p in named.items() if name != NAMES["router_bias"]]
    true = math.sqrt(sum(float(g.double().square().sum()) for g in moving))
    resting = named[NAMES["router_bias"]].grad.clone()
    assert float(clip_gradients(optimizer, 1.5)) == pytest.approx(true, rel=1e-6)
    after = math.sqrt(sum(float(g.double().square().sum()) for g in moving))
    assert after == pytest.approx(1.5, rel=1e-5)
    assert torch.equal(named[NAMES["router_bias"]].grad, resting)


def test_a_small_gradient_is_not_touched_and_a_broken_one_shows_in_the_norm():
    named = parameters()
    optimizer = build_optimizer(named, weight_decay=0.0)
    set_rates(optimizer, RATES)
    before = {name: p.grad.clone() for name, p in named.items()}
    clip_gradients(optimizer, 1e6)
    assert all(torch.equal(p.grad, before[name]) for name, p in named.items())
    named[NAMES["gate"]].grad[0, 0] = float("nan")
    assert not clip_gradients(optimizer, 1.0).isfinite()


def test_masters_in_bf16_are_refused():
    with pytest.raises(ValueError, match="must be float32"):
        build_optimizer({NAMES["gate"]: nn.Parameter(torch.zeros(1).bfloat16())}, weight_decay=0)


def test_router_biases_freeze_where_the_schedule_says_and_only_they():
    schedule = Schedule.advanced(100)
    moving, frozen = (scaled_rates(RATES, schedule.at(step)) for step in (49, 50))
    assert moving.router_bias == pytest.approx(0.4 * 0.001)
    assert frozen.router_bias == 0.0
    assert min(frozen.shared, frozen.gate, frozen.router) > 0
