"""The Triton step beside its PyTorch twin: equal but for codes on a border."""

from __future__ import annotations

import pytest
import torch

from nexus_cli.core.kernels.adamw_8bit import (
    Factors,
    Moments,
    adamw_8bit_step,
    adamw_8bit_torch,
    join_master,
    split_master,
)
from nexus_cli.core.train.adamw_8bit import AdamW8bit

pytestmark = pytest.mark.gpu

SIZES = [1, 255, 256, 257, 4096 + 13, 2880 * 2880, 128 * 2880 - 5]


def fresh(count, device):
    generator = torch.Generator().manual_seed(0)
    master = (torch.randn(count, generator=generator) * 0.05).to(device)
    return (*split_master(master), Moments.zeros(count, torch.device(device)))


def gradients(count, steps, dtype):
    generator = torch.Generator().manual_seed(1)
    scale = torch.exp(torch.randn(count, generator=generator)) * 1e-3
    return [(torch.randn(count, generator=generator) * scale).to(dtype) for _ in range(steps)]


def run(step, device, count, dtype, steps=1):
    weight, remainder, moments = fresh(count, device)
    factor = torch.tensor(0.37, device=device)
    for number, grad in enumerate(gradients(count, steps, dtype), start=1):
        factors = Factors.at(number, rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
        step(weight, remainder, moments, grad.to(device), factors, factor if number % 2 else None)
    return weight.view(torch.int16), remainder, moments


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", SIZES)
def test_one_step_is_the_twins_bit_for_bit_up_to_codes_on_a_border(count, dtype):
    mine = run(adamw_8bit_step, "cuda", count, dtype)
    twin = run(adamw_8bit_torch, "cpu", count, dtype)
    assert torch.equal(mine[0].cpu(), twin[0])
    assert torch.equal(mine[1].cpu(), twin[1])
    for name in ("first_scale_G", "second_scale_G"):
        assert torch.equal(getattr(mine[2], name).cpu(), getattr(twin[2], name))
    for name in ("first_N", "second_N"):
        apart = (getattr(mine[2], name).cpu().int() - getattr(twin[2], name).int()).abs()
        assert int(apart.max()) <= 1
        assert int(apart.sum()) <= 2 + count // 10_000


def test_many_steps_stay_beside_the_twin():
    mine, twin = (
        run(step, device, 300_000, torch.bfloat16, steps=30)
        for step, device in ((adamw_8bit_step, "cuda"), (adamw_8bit_torch, "cpu"))
    )
    masters = [join_master(w.view(torch.bfloat16), r).cpu() for w, r, _ in (mine, twin)]
    start = join_master(*fresh(300_000, "cpu")[:2])
    assert (masters[0] - masters[1]).norm() < 1e-3 * (masters[1] - start).norm()


def test_two_runs_are_bit_equal():
    first, second = (run(adamw_8bit_step, "cuda", 1_000_003, torch.bfloat16, 5) for _ in range(2))
    for mine, theirs in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_beside_the_tensor_is_written():
    count, room = 1000, 512
    parts = [*fresh(count, "cuda")[:2], *fresh(count, "cuda")[2]]
    wide = []
    for part in parts:
        buffer = torch.full((len(part) + room,), 77, device="cuda").to(part.dtype)
        buffer[: len(part)] = part
        wide.append(buffer)
    views = [buffer[: len(part)] for buffer, part in zip(wide, parts, strict=True)]
    factors = Factors.at(1, rate=1e-2, weight_decay=0.0, betas=(0.9, 0.95), epsilon=1e-8)
    grad = torch.ones(count, device="cuda")
    adamw_8bit_step(views[0], views[1], Moments(*views[2:]), grad, factors)
    for buffer, part in zip(wide, parts, strict=True):
        assert (buffer[len(part) :].float() == 77).all()


def test_the_optimizer_steps_both_kinds_of_parameters_and_sums_in_fp32():
    matrix = torch.nn.Parameter(torch.randn(128, 64, device="cuda").bfloat16())
    gate = torch.nn.Parameter(torch.ones(1, device="cuda"))
    matrix.grad_dtype = torch.float32
    optimizer = AdamW8bit([matrix, gate], lr=1e-2)
    before = optimizer.master(matrix)
    for _ in range(2):
        for _ in range(3):
            (gate * (torch.randn(32, 64, device="cuda").bfloat16() @ matrix.T)).sum().backward()
        assert matrix.grad.dtype == torch.float32
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < float((optimizer.master(matrix) - before).abs().max()) < 0.03
    assert gate.detach().item() != 1.0
