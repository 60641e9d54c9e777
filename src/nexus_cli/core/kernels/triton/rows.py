"""Gather of tokens into routed rows, and their weighted sum back: no atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Shape letters in this file: T tokens, K experts a token, R routed rows, E experts, H hidden.

PIECE = 1024  # columns of a sum: 8 a thread, 16 bytes of bfloat16
WARPS = 4


@triton.jit
def spread_kernel(x, row_of, out, K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """One token, to its K rows."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    value = tl.load(x + token * H + columns, columns < H)
    for k in tl.static_range(K):
        row = tl.load(row_of + token * K + k).to(tl.int64)
        tl.store(out + row * H + columns, value, columns < H)


@triton.jit
def combine_kernel(
    rows,
    row_of,
    scores,
    experts,
    biases,
    residual,
    shared,
    shared_bias,
    shared_scale,
    out,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of one token; parts that are None are left out."""
    # A token's pieces run side by side.
    pieces: tl.constexpr = (H + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    place = token * H + columns
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of + token * K + k).to(tl.int64)
        value = tl.load(rows + row * H + columns, inside, 0.0).to(tl.float32)
        if biases is not None:
            expert = tl.load(experts + token * K + k).to(tl.int64)
            value += tl.load(biases + expert * H + columns, inside, 0.0).to(tl.float32)
        if scores is not None:
            value *= tl.load(scores + token * K + k).to(tl.float32)
        total += value
    if residual is not None:
        total += tl.load(residual + place, inside, 0.0).to(tl.float32)
    if shared is not None:
        value = tl.load(shared + place, inside, 0.0).to(tl.float32)
        if shared_bias is not None:
            value += tl.load(shared_bias + columns, inside, 0.0).to(tl.float32)
        if shared_scale is not None:
            value *= tl.load(shared_scale).to(tl.float32)
        total += value
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


def spread_rows(x_TH: Tensor, row_TK: Tensor) -> Tensor:
    """See :func:`nexus_cli.core.kernels.rows.spread_rows`."""
    (tokens, top_k), hidden = row_TK.shape, x_TH.shape[1]
    x_RH = x_TH.new_empty(tokens * top_k, hidden)
    if tokens:
        spread_kernel[(tokens,)](
            x_TH,
            row_TK,
            x_RH,
            K=top_k,
            H=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            num_warps=WARPS,
        )
    return x_RH


def combine_rows(
    rows_RH: Tensor,
    row_TK: Tensor,
    scores_TK: Tensor | None,
    experts_TK: Tensor | None,
    bias_EH: Tensor | None,
    residual_TH: Tensor | None,
    shared_TH: Tensor | None,
    shared_bias_H: Tensor | None,
    shared_scale: Tensor | None,
) -> Tensor:
    """See :func:`nexus_cli.core.kernels.rows.combine_rows`."""
    (tokens, top_k), hidden = row_TK.shape, rows_RH.shape[1]
    out_TH = rows_RH.new_empty(tokens, hidden)
    block = min(PIECE, triton.next_power_of_2(hidden))
    combine_kernel[(tokens * triton.cdiv(hidden, block),)](
        rows_RH,
        row_TK,
        scores_TK,
        experts_TK,
        bias_EH,
        residual_TH,
        shared_TH,
        shared_bias_H,
        shared_scale,
        out_TH,
        K=top_k,
        H=hidden,
        BLOCK=block,
        num_warps=WARPS,
    )
    return out_TH
