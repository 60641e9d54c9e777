"""Decode packed MXFP4 weights into bf16, at the speed of memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nexus_cli.core.kernels.triton.mxfp4 import decode

TILE = 256  # blocks of 32 weights a program


@triton.jit
def decode_kernel(
    blocks, scales, out, rows, features, group_stride, feature_stride,
    GROUPS_OF_ROW: tl.constexpr, MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A tile of rows, counted over all experts, and of blocks of 32 weights in each."""
    across: tl.constexpr = GROUPS_OF_ROW // GROUPS
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = (tl.program_id(0) % across) * GROUPS + tl.arange(0, GROUPS)
    seen = (row < rows)[:, None]
    byte = (tl.program_id(0) % across) * (GROUPS * 16) + tl.arange(0, GROUPS * 16)
    packed = tl.load(
        blocks + row[:, None] * (GROUPS_OF_ROW * 16) + byte[None, :], mask=seen, other=0
    )
    expert, feature = row // features, row % features
    scale_row = expert * features * GROUPS_OF_ROW + feature * feature_stride
    scale = tl.load(scales + scale_row[:, None] + group[None, :] * group_stride, mask=seen, other=0)
    weight = decode(packed, scale, ROWS, GROUPS * 32, MODE)
    column = (tl.program_id(0) % across) * (GROUPS * 32) + tl.arange(0, GROUPS * 32)
    place = out + row[:, None] * (GROUPS_OF_ROW * 32) + column[None, :]
    tl.store(place, weight.to(out.dtype.element_ty), mask=seen)


def decode_into(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Launch :func:`decode_kernel`; scales may lie in either order of features and blocks."""
    experts, features, groups = scales.shape
    rows = experts * features
    if not rows or not groups:
        return
    width = next(width for width in (8, 4, 2, 1) if groups % width == 0)
    tall = TILE // width
    decode_kernel[(triton.cdiv(rows, tall) * (groups // width),)](
        blocks, scales, out, rows, features, scales.stride(2), scales.stride(1),
        GROUPS_OF_ROW=groups, MODE="wide", ROWS=tall, GROUPS=width, num_warps=4,
    )  # fmt: skip
