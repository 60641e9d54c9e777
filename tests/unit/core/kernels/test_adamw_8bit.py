"""Split masters are exact, codes err little and never dangerously, a step is AdamW's."""

from __future__ import annotations

import math

import pytest
import torch

from nexus_cli.core.kernels.adamw_8bit import (
    BLOCK,
    Factors,
    Moments,
    adamw_8bit_step,
    adamw_8bit_torch,
    decode_first,
    decode_root,
    encode_first,
    encode_root,
    join_master,
    split_master,
)

BETAS = (0.9, 0.95)


def factors(step, *, rate=1e-2, weight_decay=0.1, betas=BETAS):
    return Factors.at(step, rate=rate, weight_decay=weight_decay, betas=betas, epsilon=1e-8)


def fresh(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, remainder = split_master(torch.randn(count, generator=generator) * 0.05)
    return weight, remainder, Moments.zeros(count, torch.device("cpu"))


def gradients(count, steps, spread=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(count, generator=generator) * spread) * 1e-3
    return [torch.randn(count, generator=generator) * scale for _ in range(steps)]


@pytest.mark.parametrize("sign", [1, -1])
def test_every_remainder_under_a_bf16_number_comes_back(sign):
    """All 65,536 of them under zero, subnormals, every 257th number, and the largest."""
    low = torch.arange(2**16, dtype=torch.int32)
    for high in (*range(0, 0x7F80, 0x101), 0x01, 0x7F, 0x80, 0x7F7E, 0x7F7F):
        master = sign * ((high << 16) + low).view(torch.float32)
        weight, remainder = split_master(master)
        exact = join_master(weight, remainder)
        assert torch.equal(exact.view(torch.int32), master.view(torch.int32))
        nearest, is_tie = master.bfloat16(), low == 0x8000
        assert torch.equal(weight[~is_tie], nearest[~is_tie])
        assert (weight[is_tie].abs() >= nearest[is_tie].abs()).all()


def test_infinity_comes_back():
    master = torch.tensor([float("inf"), -float("inf")])
    assert torch.equal(join_master(*split_master(master)), master)


def test_a_number_too_large_for_bf16_is_kept_though_its_weight_is_infinite():
    master = torch.tensor([torch.finfo(torch.float32).max, -3.4e38])
    weight, remainder = split_master(master)
    assert weight.isinf().all()
    assert torch.equal(join_master(weight, remainder), master)


def test_every_nan_stays_one():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    weight, remainder = split_master(bits.view(torch.float32))
    assert weight.isnan().all()
    assert join_master(weight, remainder).isnan().all()


def test_codes_are_fixed_points_and_the_largest_of_a_block_is_exact():
    first = torch.arange(-127, 128, dtype=torch.int8)
    root = torch.arange(256, dtype=torch.uint8)
    scale = torch.tensor([3.7e-5])
    again, scale_again = encode_first(decode_first(first, scale))
    assert torch.equal(again.flatten()[:255], first)
    torch.testing.assert_close(scale_again, scale, rtol=2e-7, atol=0)
    again, scale_again = encode_root(decode_root(root, scale))
    assert torch.equal(again.flatten(), root)
    torch.testing.assert_close(scale_again, scale, rtol=2e-7, atol=0)


def test_codes_err_by_few_percent_over_four_decades():
    values = torch.logspace(-4, 0, 256)[None]
    first = decode_first(*(part.flatten() for part in encode_first(-values)))
    root = decode_root(*(part.flatten() for part in encode_root(values)))
    for decoded, worst, near in ((-first, 0.18, 0.032), (root, 0.07, 0.015)):
        error = (decoded / values - 1).abs()
        assert float(error.max()) < worst
        assert float(error[values > 0.25].max()) < near


@pytest.mark.parametrize("ratio", [1e-3, 1e-5, 1e-8, 0.0])
def test_a_root_that_vanishes_beside_its_block_never_makes_a_huge_update(ratio):
    """The root has a floor, so an update is at most a little larger than with exact moments."""
    count = BLOCK
    weight, remainder, moments = fresh(count)
    grad = torch.full((count,), ratio)
    grad[0] = 1.0
    exact_first, exact_second = torch.zeros(count).double(), torch.zeros(count).double()
    for step in range(1, 30):
        before = join_master(weight, remainder)
        adamw_8bit_step(weight, remainder, moments, grad, factors(step, weight_decay=0.0))
        exact_first = 0.9 * exact_first + 0.1 * grad.double()
        exact_second = 0.95 * exact_second + 0.05 * grad.double() ** 2
        root = (exact_second / (1 - 0.95**step)).sqrt() + 1e-8
        exact = 1e-2 * exact_first / (1 - 0.9**step) / root
        change = (join_master(weight, remainder) - before).abs().double()
        assert (change <= 1.4 * exact + 1e-8).all()


def test_a_block_of_zeros_and_vanishing_numbers_stays_finite():
    weight, remainder, moments = fresh(3 * BLOCK)
    before = join_master(weight, remainder)
    grad = torch.zeros(3 * BLOCK)
    grad[BLOCK : 2 * BLOCK] = 1e-39
    grad[2 * BLOCK :] = 1e-30
    for step in range(1, 4):
        adamw_8bit_step(weight, remainder, moments, grad, factors(step, weight_decay=0.0))
    after = join_master(weight, remainder)
    assert after.isfinite().all()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-20)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_the_first_step_is_adamw_in_float64(count):
    weight, remainder, moments = fresh(count)
    before = join_master(weight, remainder).double()
    grad = gradients(count, 1)[0]
    adamw_8bit_step(weight, remainder, moments, grad, factors(1), torch.tensor(0.25))
    expected = before * (1 - 1e-3) - 1e-2 * (0.25 * grad.double()) / (
        (0.25 * grad.double()).abs() + 1e-8
    )
    torch.testing.assert_close(
        join_master(weight, remainder).double(), expected, rtol=1e-6, atol=1e-8
    )


def test_many_steps_stay_near_fp32_adamw():
    """Relative to the way that the weights go, the moments' codes cost a few percent."""
    count, steps = 64 * BLOCK, 60
    weight, remainder, moments = fresh(count)
    start = join_master(weight, remainder)
    reference = torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([reference], lr=1e-2, betas=BETAS, weight_decay=0.1)
    for step, grad in enumerate(gradients(count, steps), start=1):
        reference.grad = grad
        adamw.step()
        adamw_8bit_step(weight, remainder, moments, grad, factors(step))
    way = (reference.detach() - start).norm()
    apart = (join_master(weight, remainder) - reference.detach()).norm()
    assert float(apart / way) < 0.05


def test_a_rate_of_zero_leaves_the_master_and_moves_the_moments():
    weight, remainder, moments = fresh(300)
    before = join_master(weight, remainder)
    adamw_8bit_step(weight, remainder, moments, gradients(300, 1)[0], factors(1, rate=0.0))
    assert torch.equal(join_master(weight, remainder), before)
    assert bool(moments.first_N.any())
    assert float(moments.second_scale_G.min()) > 0


def test_updates_far_below_a_bf16_step_add_up():
    """What bf16 alone would lose: 1000 updates of 1e-6 under weights of 1."""
    weight, remainder = split_master(torch.ones(BLOCK))
    moments = Moments.zeros(BLOCK, torch.device("cpu"))
    for step in range(1, 1001):
        now = factors(step, rate=1e-6, weight_decay=0.0)
        adamw_8bit_step(weight, remainder, moments, torch.ones(BLOCK), now)
    after = join_master(weight, remainder)
    assert float(after.mean()) == pytest.approx(1 - 1e-3, rel=1e-4)
    assert math.isclose(float(weight[0]), float(after[0]), rel_tol=2**-8)


def test_two_runs_are_equal_and_bf16_gradients_are_taken_as_they_are():
    results = []
    for convert in (torch.Tensor.bfloat16, lambda grad: grad.bfloat16().float()):
        weight, remainder, moments = fresh(1000)
        for step, grad in enumerate(gradients(1000, 5), start=1):
            adamw_8bit_torch(weight, remainder, moments, convert(grad), factors(step))
        results.append([weight.view(torch.int16), remainder, *moments])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_other_formats_are_refused():
    weight, remainder, moments = fresh(300)
    grad = torch.zeros(300)
    for wrong in (
        (weight.float(), remainder, moments, grad),
        (weight, remainder.int(), moments, grad),
        (weight, remainder, moments._replace(first_N=moments.first_N[:-1]), grad),
        (weight, remainder, moments, grad.double()),
        (weight, remainder, moments, grad[:-1]),
        (weight.new_empty(600)[::2], remainder, moments, grad),
        (weight.to("meta"), remainder, moments, grad),
        (weight, remainder, moments, grad.to("meta")),
        (weight[:0], remainder[:0], moments, grad[:0]),
    ):
        with pytest.raises(ValueError, match=r"must be|adamw-8bit|several devices"):
            adamw_8bit_step(*wrong, factors(1))
    with pytest.raises(ValueError, match="gradient's factor"):
        adamw_8bit_step(weight, remainder, moments, grad, factors(1), torch.ones(2))
