"""The optimizer with split masters: exact values in and out, both kinds of parameters, clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nexus_cli.core.distill.anchor import Anchor
from nexus_cli.core.train.adamw_8bit import AdamW8bit
from nexus_cli.core.train.optim import (
    Rates,
    build_optimizer,
    clip_gradients,
    read_master,
    set_rates,
    write_master,
)
from nexus_cli.core.train.precision import SPLIT_FROM, promote
from nexus_cli.core.train.state import (
    TrainingState,
    exact_masters,
    optimizer_moments,
    read_state,
    restore,
    write_state,
)
from nexus_cli.errors import ArtifactError

MATRIX, BIAS, GATE = (
    f"model.layers.0.mlp.shared_expert.{leaf}"
    for leaf in ("up_proj.weight", "up_proj.bias", "output_gate")
)
RATES = Rates(shared=1e-2, gate=1e-1, router=0.0, router_bias=0.0)


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        MATRIX: nn.Parameter(torch.randn(70, 9, generator=generator).bfloat16()),
        BIAS: nn.Parameter(torch.randn(9, generator=generator)),
        GATE: nn.Parameter(torch.ones(1)),
    }


def trained(seed, steps, **settings):
    named = parameters(seed)
    optimizer = build_optimizer(named, weight_decay=0.1, optimizer="adamw-8bit", **settings)
    for _ in range(steps):
        advance(named, optimizer)
    return named, optimizer


def advance(named, optimizer):
    for name, parameter in named.items():
        parameter.grad = torch.sin(read_master(optimizer, named[name]) * 3).to(parameter.dtype)
    set_rates(optimizer, RATES)
    clip_gradients(optimizer, 1.0)
    optimizer.step()


def test_small_fp32_parameters_are_stepped_by_adamw_bit_for_bit():
    named, optimizer = trained(seed=0, steps=0)
    twins = {name: nn.Parameter(named[name].detach().clone()) for name in (BIAS, GATE)}
    adamw = build_optimizer(twins, weight_decay=0.1)
    for step in range(4):
        for name, twin in twins.items():
            twin.grad = torch.full_like(twin, 0.1 + step)
            named[name].grad = twin.grad.clone()
        for each in (optimizer, adamw):
            set_rates(each, RATES)
            each.step()
    assert all(torch.equal(named[name], twin) for name, twin in twins.items())


def test_a_matrix_is_the_rounded_master_and_the_master_moves_in_fp32():
    named, optimizer = trained(seed=0, steps=3)
    master = read_master(optimizer, named[MATRIX])
    assert master.dtype == torch.float32
    assert not torch.equal(master, named[MATRIX].float())
    assert torch.equal(master.bfloat16(), named[MATRIX])


def test_exact_values_are_read_and_written():
    named, optimizer = trained(seed=0, steps=1)
    value = torch.randn(70, 9)
    write_master(optimizer, named[MATRIX], value)
    assert torch.equal(read_master(optimizer, named[MATRIX]), value)
    write_master(optimizer, named[GATE], torch.tensor([0.3]))
    assert read_master(optimizer, named[GATE]).item() == pytest.approx(0.3)


def test_clipping_leaves_the_gradients_and_scales_the_step():
    (named, optimizer), (scaled, other) = trained(0, 0), trained(0, 0)
    grads = {name: torch.randn_like(parameter) * 5 for name, parameter in named.items()}
    true = torch.cat([grad.flatten().double() for grad in grads.values()]).norm()
    for name, grad in grads.items():
        named[name].grad = grad.clone()
    set_rates(optimizer, RATES)
    norm = clip_gradients(optimizer, 1.5)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(true), rel=1e-6)
    assert torch.equal(named[MATRIX].grad, grads[MATRIX])
    optimizer.step()
    assert optimizer.gradient_factor is None
    for name, grad in grads.items():
        scaled[name].grad_dtype = torch.float32
        scaled[name].grad = grad.float() * (1.5 / (norm + 1e-6))
    set_rates(other, RATES)
    other.step()
    for name, parameter in named.items():
        assert torch.equal(read_master(optimizer, parameter), read_master(other, scaled[name]))


def test_a_frozen_group_keeps_its_masters_and_is_not_clipped():
    named, optimizer = trained(seed=0, steps=2)
    before = read_master(optimizer, named[MATRIX])
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    set_rates(optimizer, Rates(0.0, 0.1, 0.0, 0.0))
    assert float(clip_gradients(optimizer, 0.5)) == pytest.approx(1.0)
    optimizer.step()
    assert torch.equal(read_master(optimizer, named[MATRIX]), before)


def test_gradients_of_several_passes_are_summed_in_fp32():
    parameter = nn.Parameter(torch.ones(4).bfloat16())
    parameter.grad_dtype = torch.float32
    for _ in range(300):
        parameter.sum().backward()
    assert parameter.grad.dtype == torch.float32
    assert parameter.grad.tolist() == [300.0] * 4  # bf16 stops at 256


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    named, optimizer = trained(seed=0, steps=3)
    state = TrainingState(
        step=3,
        tokens=9,
        identity={},
        masters=exact_masters(optimizer, named),
        moments=optimizer_moments(optimizer, named),
    )
    assert {tensor.dtype for tensor in state.masters.values()} == {torch.float32}
    write_state(tmp_path / "state", state)
    other, fresh = trained(seed=1, steps=2)
    restore(read_state(tmp_path / "state"), other, fresh)
    for _ in range(3):
        advance(named, optimizer)
        advance(other, fresh)
    for name, parameter in named.items():
        assert torch.equal(read_master(optimizer, parameter), read_master(fresh, other[name]))
    plain = {name: nn.Parameter(parameter.float()) for name, parameter in named.items()}
    with pytest.raises(ArtifactError, match="another optimizer"):
        restore(state, plain, build_optimizer(plain, weight_decay=0.1))


def test_a_state_dict_keeps_every_format():
    named, optimizer = trained(seed=0, steps=3)
    other, fresh = trained(seed=0, steps=0)
    fresh.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(named.values(), other.values(), strict=True):
        state, copied = optimizer.state[mine], fresh.state[theirs]
        assert state.keys() == copied.keys()
        for key, value in state.items():
            assert copied[key].dtype == value.dtype
            assert torch.equal(copied[key], value)


def test_averaging_pulls_the_exact_masters():
    named, optimizer = trained(seed=0, steps=1)

    def read(parameter):
        return read_master(optimizer, parameter)

    def write(parameter, value):
        write_master(optimizer, parameter, value)

    start = read(named[MATRIX]).clone()
    anchor = Anchor(named, beta=0.25, every=1, read=read, write=write)
    assert torch.equal(anchor.state_dict()[MATRIX], start)
    for _ in range(3):
        advance(named, optimizer)
    before = read(named[MATRIX])
    move = anchor.merge(named)
    assert torch.equal(read(named[MATRIX]), before.lerp(start, 0.25))
    assert move.l2 > 0


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        AdamW8bit([nn.Parameter(torch.zeros(3).half())])


def test_large_tensors_are_split_and_small_ones_stay_whole():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 4))
    assert model[0].weight.numel() == SPLIT_FROM
    masters = promote(model, ["0.weight", "0.bias", "1.weight"], split=True)
    assert masters["0.weight"].dtype == torch.bfloat16
    assert masters["0.bias"].dtype == masters["1.weight"].dtype == torch.float32
    assert not model[1].bias.requires_grad


def test_a_closure_is_called_with_gradients():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = AdamW8bit([parameter], lr=0.1, weight_decay=0.0)

    def closure():
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 2.0
    assert parameter.tolist() == pytest.approx([0.9, 0.9])
