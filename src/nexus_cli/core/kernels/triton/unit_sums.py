"""Weighted sums of the magnitudes of activations, an expert at a time: no atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Shape letters in this file: R routed rows sorted by expert, E experts, I expert width.

ROWS, UNITS, WARPS = 64, 64, 4


@triton.jit
def unit_sums_kernel(
    hidden,
    weight,
    offsets,
    scale,
    out,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Some units of one expert, over all of its rows."""
    expert = tl.program_id(0).to(tl.int64)
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    inside = units < WIDTH
    begin = tl.load(offsets + expert - 1, expert > 0, 0)
    end = tl.load(offsets + expert)
    total = tl.zeros((UNITS,), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < end
        place = row.to(tl.int64)[:, None] * WIDTH + units[None, :]
        value = tl.load(hidden + place, there[:, None] & inside[None, :], 0.0).to(tl.float32)
        each = tl.load(weight + row, there, 0.0)
        total += tl.sum(tl.abs(value) * each[:, None], axis=0)
    where = expert * WIDTH + units
    total *= tl.load(scale + where, inside, 0.0)
    before = tl.load(out + where, inside, 0.0)
    tl.store(out + where, before + total.to(tl.float64), inside)


def add_unit_sums_(
    sum_EI: Tensor, hidden_RI: Tensor, weight_R: Tensor, offsets_E: Tensor, scale_EI: Tensor
) -> Tensor:
    """See :func:`nexus_cli.core.kernels.unit_sums.add_unit_sums_`."""
    experts, width = sum_EI.shape
    unit_sums_kernel[(experts, triton.cdiv(width, UNITS))](
        hidden_RI,
        weight_R,
        offsets_E,
        scale_EI,
        sum_EI,
        WIDTH=width,
        ROWS=ROWS,
        UNITS=UNITS,
        num_warps=WARPS,
    )
    return sum_EI
