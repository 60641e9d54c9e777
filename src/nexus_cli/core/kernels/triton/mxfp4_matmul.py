"""Grouped products that decode MXFP4 weights on their way into the tensor cores.

A tile may be multiplied either way round. ``dot(W, x^T)``, swapped, makes the decoded weights an
operand in registers on Hopper: they never travel through shared memory, and a tile of few rows
wastes little. ``dot(x, W)`` sends them through it. Decoding is repeated for every tile of rows;
that is what makes these kernels best where an expert has few of them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nexus_cli.core.kernels.triton.mxfp4 import decode


class Tiles(NamedTuple):
    """Sizes of one program's work.

    Attributes:
        rows: of the input.
        features: of the result.
        depth: of one step of the sum.
        warps: of a program.
        stages: of software pipelining.
        swapped: whether the weights are the first operand.
    """

    rows: int
    features: int
    depth: int
    warps: int
    stages: int
    swapped: bool


# Average rows an expert below which a tile serves best, measured on an H100 with
# benchmarks/gpu/tune_mxfp4_matmul.py.
FORWARD = (
    (16, Tiles(32, 128, 64, 4, 4, swapped=True)),
    (64, Tiles(64, 128, 64, 4, 3, swapped=True)),
    (256, Tiles(64, 128, 64, 4, 3, swapped=False)),
    (float("inf"), Tiles(128, 128, 64, 8, 3, swapped=True)),
)
TRANSPOSED = (
    (64, Tiles(64, 256, 64, 8, 3, swapped=False)),
    (192, Tiles(64, 128, 64, 4, 3, swapped=False)),
    (float("inf"), Tiles(128, 128, 64, 8, 4, swapped=False)),
)


def choose_tiles(rows_per_expert: float, *, transposed: bool) -> Tiles:
    """The tiles for an average number of rows an expert."""
    table = TRANSPOSED if transposed else FORWARD
    return next(tiles for limit, tiles in table if rows_per_expert < limit)


@triton.jit
def find_tile(offsets, tile, num_experts, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Expert, first row and end of rows of a tile; past the last one, expert ``num_experts``."""
    lane = tl.arange(0, PADDED)
    seen = lane < num_experts
    ends = tl.load(offsets + lane, mask=seen, other=0)
    starts = tl.load(offsets + lane - 1, mask=seen & (lane > 0), other=0)
    tiles = tl.where(seen, (ends - starts + ROWS - 1) // ROWS, 0)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum(tl.where(seen & (upto <= tile), 1, 0), 0)
    here = lane == expert
    first = tl.sum(tl.where(here, upto - tiles, 0), 0)
    start = tl.sum(tl.where(here, starts, 0), 0)
    end = tl.sum(tl.where(here, ends, 0), 0)
    return expert, start + (tile - first) * ROWS, end


@triton.jit
def forward_kernel(
    x, index, blocks, scales, offsets, out, outputs, inputs, num_experts,
    group_stride, feature_stride,
    GATHER: tl.constexpr, MODE: tl.constexpr, EVEN: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """``out[r, n] = sum_k x[index[r], k] W[n, k]`` for one tile; neighbours share an expert."""
    across = tl.cdiv(outputs, FEATURES)
    program = tl.program_id(0)
    expert, first_row, end = find_tile(offsets, program // across, num_experts, PADDED, ROWS)
    if expert >= num_experts:
        return
    first_feature = (program % across) * FEATURES
    rows = first_row + tl.arange(0, ROWS)
    source = tl.minimum(rows, end - 1)  # rows past the end repeat the last one: no masks on loads
    if GATHER:
        source = tl.load(index + source)
    feature = tl.minimum(first_feature + tl.arange(0, FEATURES), outputs - 1)
    depth = tl.arange(0, DEPTH)
    byte = tl.arange(0, DEPTH // 2)
    group = tl.arange(0, DEPTH // 32)
    x_at = x + source.to(tl.int64)[:, None] * inputs + depth[None, :]
    weight_row = expert.to(tl.int64) * outputs + feature
    packed_at = blocks + weight_row[:, None] * (inputs // 2) + byte[None, :]
    first_scale = scales + expert.to(tl.int64) * outputs * (inputs // 32)
    scale_at = first_scale + group[:, None] * group_stride + feature[None, :] * feature_stride
    if SWAPPED:
        total = tl.zeros((FEATURES, ROWS), tl.float32)
    else:
        total = tl.zeros((ROWS, FEATURES), tl.float32)
    scale = tl.load(scale_at, mask=(group < inputs // 32)[:, None], other=0)
    for start in range(0, inputs, DEPTH):
        if EVEN:
            part = tl.load(x_at)
            packed = tl.load(packed_at)
        else:
            part = tl.load(x_at, mask=(start + depth < inputs)[None, :], other=0.0)
            packed = tl.load(packed_at, mask=(start // 2 + byte < inputs // 2)[None, :], other=0)
        weight = decode(packed, tl.trans(scale), FEATURES, DEPTH, MODE)
        # So few scales are too narrow for asynchronous copies: each step loads the next one's.
        scale_at += (DEPTH // 32) * group_stride
        left = (start + DEPTH) // 32 + group < inputs // 32
        scale = tl.load(scale_at, mask=left[:, None], other=0)
        if SWAPPED:
            total = tl.dot(weight, tl.trans(part), total)
        else:
            total = tl.dot(part, tl.trans(weight), total)
        x_at += DEPTH
        packed_at += DEPTH // 2
    result = total.to(out.dtype.element_ty)
    if SWAPPED:
        result = tl.trans(result)
    written = first_feature + tl.arange(0, FEATURES)
    place = out + rows.to(tl.int64)[:, None] * outputs + written[None, :]
    mask = (rows < end)[:, None] & (written < outputs)[None, :]
    tl.store(place, result, mask=mask)


@triton.jit
def transposed_kernel(
    grad, index, blocks, scales, offsets, out, outputs, inputs, num_experts,
    group_stride, feature_stride,
    GATHER: tl.constexpr, MODE: tl.constexpr, EVEN: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """``out[r, k] = sum_n grad[index[r], n] W[n, k]`` for one tile; no transposed copy of W."""
    across = tl.cdiv(inputs, FEATURES)
    program = tl.program_id(0)
    expert, first_row, end = find_tile(offsets, program // across, num_experts, PADDED, ROWS)
    if expert >= num_experts:
        return
    first_feature = (program % across) * FEATURES
    rows = first_row + tl.arange(0, ROWS)
    source = tl.minimum(rows, end - 1)
    if GATHER:
        source = tl.load(index + source)
    depth = tl.arange(0, DEPTH)
    byte = first_feature // 2 + tl.arange(0, FEATURES // 2)
    known = (byte < inputs // 2)[None, :]  # a clamp would cost the loads their width
    group = tl.minimum(first_feature // 32 + tl.arange(0, FEATURES // 32), inputs // 32 - 1)
    grad_at = grad + source.to(tl.int64)[:, None] * outputs + depth[None, :]
    weight_row = expert.to(tl.int64) * outputs + depth
    packed_at = blocks + weight_row[:, None] * (inputs // 2) + byte[None, :]
    first_scale = scales + expert.to(tl.int64) * outputs * (inputs // 32)
    scale_at = first_scale + group[:, None] * group_stride + depth[None, :] * feature_stride
    if SWAPPED:
        total = tl.zeros((FEATURES, ROWS), tl.float32)
    else:
        total = tl.zeros((ROWS, FEATURES), tl.float32)
    scale = tl.load(scale_at, mask=(depth < outputs)[None, :], other=0)
    for start in range(0, outputs, DEPTH):
        if EVEN:
            part = tl.load(grad_at)
            packed = tl.load(packed_at, mask=known, other=0)
        else:
            left = start + depth < outputs
            part = tl.load(grad_at, mask=left[None, :], other=0.0)
            packed = tl.load(packed_at, mask=left[:, None] & known, other=0)
        weight = decode(packed, tl.trans(scale), DEPTH, FEATURES, MODE)
        scale_at += DEPTH * feature_stride
        scale = tl.load(scale_at, mask=(start + DEPTH + depth < outputs)[None, :], other=0)
        if SWAPPED:
            total = tl.dot(tl.trans(weight), tl.trans(part), total)
        else:
            total = tl.dot(part, weight, total)
        grad_at += DEPTH
        packed_at += DEPTH * (inputs // 2)
    result = total.to(out.dtype.element_ty)
    if SWAPPED:
        result = tl.trans(result)
    written = first_feature + tl.arange(0, FEATURES)
    place = out + rows.to(tl.int64)[:, None] * inputs + written[None, :]
    mask = (rows < end)[:, None] & (written < inputs)[None, :]
    tl.store(place, result, mask=mask)


def matmul_rows(
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    offsets_E: Tensor,
    row_index_R: Tensor | None,
    *,
    transposed: bool,
    small_scales: bool,
    tiles: Tiles | None = None,
) -> Tensor:
    """Launch a product; the grid is an upper bound, and programs without rows leave at once."""
    experts, outputs, groups, _ = blocks.shape
    inputs = groups * 32
    rows = len(x) if row_index_R is None else len(row_index_R)
    width, depth = (inputs, outputs) if transposed else (outputs, inputs)
    out = x.new_empty(rows, width)
    if not rows:
        return out
    chosen = tiles or choose_tiles(rows / experts, transposed=transposed)
    programs = (triton.cdiv(rows, chosen.rows) + min(experts, rows)) * triton.cdiv(
        width, chosen.features
    )
    kernel = transposed_kernel if transposed else forward_kernel
    kernel[(programs,)](
        x, row_index_R if row_index_R is not None else offsets_E, blocks, scales, offsets_E, out,
        outputs, inputs, experts, scales.stride(2), scales.stride(1),
        GATHER=row_index_R is not None,
        MODE="narrow" if small_scales else "wide",
        EVEN=depth % chosen.depth == 0,
        PADDED=max(16, triton.next_power_of_2(experts)),
        ROWS=chosen.rows,
        FEATURES=chosen.features,
        DEPTH=chosen.depth,
        SWAPPED=chosen.swapped,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )  # fmt: skip
    return out
