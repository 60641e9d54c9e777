"""Rotary position embedding in place: one token a program, all its heads at once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Shape letters in this file: T tokens, D columns of the projection, R half a head.

VALUES_A_THREAD = 16  # of each half: two 16-byte accesses of bfloat16


@triton.jit
def rotate_kernel(
    qkv,
    cosines,
    sines,
    stride,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """All heads of one token, in place."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)
    halves = tl.arange(0, BLOCK_R)
    inside_R = halves < R
    inside = (heads < HEADS)[:, None] & inside_R[None, :]
    cos = tl.load(cosines + token * R + halves, inside_R, 0.0)[None, :]
    sin = tl.load(sines + token * R + halves, inside_R, 0.0)[None, :]
    if INVERSE:
        sin = -sin
    place = qkv + token * stride + heads[:, None] * (2 * R) + halves[None, :]
    first = tl.load(place, inside, 0.0).to(tl.float32)
    second = tl.load(place + R, inside, 0.0).to(tl.float32)
    tl.store(place, (first * cos - second * sin).to(qkv.dtype.element_ty), inside)
    tl.store(place + R, (second * cos + first * sin).to(qkv.dtype.element_ty), inside)


def rotate_(
    qkv_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, num_heads: int, head_dim: int, inverse: bool
) -> None:
    """See :func:`nexus_cli.core.kernels.rotary.rotate_`."""
    half = head_dim // 2
    block_heads = triton.next_power_of_2(num_heads)
    block_half = triton.next_power_of_2(half)
    rotate_kernel[(qkv_TD.shape[0],)](
        qkv_TD,
        cos_TR,
        sin_TR,
        qkv_TD.stride(0),
        HEADS=num_heads,
        R=half,
        INVERSE=inverse,
        BLOCK_HEADS=block_heads,
        BLOCK_R=block_half,
        num_warps=min(8, max(1, block_heads * block_half // (32 * VALUES_A_THREAD))),
    )
