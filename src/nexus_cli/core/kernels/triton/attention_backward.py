"""Triton backward of :func:`nexus_cli.core.kernels.attention.sink_attention`.

Three launches, each of which owns what it writes (no atomics): gradients of the queries (and, on
the way, two numbers a row that the next launch reads), gradients of keys and values, and, where
one program a block of keys would leave the GPU idle, the sum of what several programs found for
the same keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nexus_cli.core.kernels.triton.attention import (
    LOG2E,
    Tile,
    Tiles,
    between,
    choose_tile,
    generation,
    key_ranges,
    load_rows,
    tile_arguments,
)
from nexus_cli.core.kernels.triton.attention_keys import KEY_TILES, launch_keys

_LOG2E = tl.constexpr(LOG2E)

QUERY_TILES = Tiles(
    full=Tile(2, 64, 64, 4, 2),
    narrow=Tile(2, 64, 64, 4, 2),
    large=Tile(1, 64, 32, 4, 2),
    old=Tile(1, 64, 32, 4, 2),
)


@triton.jit(do_not_specialize=["seq"])
def query_kernel(
    grad_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    grad_qkv_ptr,
    rows_ptr,
    seq,
    padded,
    scale,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradient of one tile of queries; and of each row, for the keys, two float32 numbers.

    They are the logarithm of the denominator to base 2, and ``delta = sum(grad * out)``, in
    planes ``[B, Hq, padded]`` one after the other. All of these are written, so that the next
    launch may read whole blocks; ``padded`` is the sequence in whole blocks of positions.

    Grid: (Hq / HEADS, blocks of positions, B), as in the forward.
    """
    ROW: tl.constexpr = (HQ + 2 * HKV) * D
    first_head = tl.program_id(0) * HEADS
    block = (tl.num_programs(1) - 1 - tl.program_id(1)) * POSITIONS
    batch = tl.program_id(2).to(tl.int64)
    qkv_ptr += batch * seq * ROW
    start_ptr += batch * seq
    k_ptr = qkv_ptr + (HQ + first_head // (HQ // HKV)) * D
    v_ptr = k_ptr + HKV * D

    r = tl.arange(0, HEADS * POSITIONS)
    d = tl.arange(0, D)
    head_r = first_head + r // POSITIONS
    row_r = block + r % POSITIONS
    pos_r = tl.minimum(row_r, seq - 1)
    kept_r = row_r < seq
    q_rd = tl.load(qkv_ptr + (pos_r * ROW + head_r * D)[:, None] + d[None, :])
    start_r = tl.load(start_ptr + pos_r)
    out_rd = batch * seq * HQ * D + (pos_r * (HQ * D) + head_r * D)[:, None] + d[None, :]
    grad_rd = tl.load(grad_ptr + out_rd)
    value_rd = tl.load(out_ptr + out_rd)
    delta_r = tl.sum(grad_rd.to(tl.float32) * value_rd.to(tl.float32), 1)
    lse_r = tl.load(lse_ptr + (batch * HQ + head_r) * seq + pos_r) * _LOG2E
    rows_ptr += (batch * HQ + head_r) * padded + row_r
    tl.store(rows_ptr, lse_r)
    tl.store(rows_ptr + tl.num_programs(2).to(tl.int64) * HQ * padded, delta_r)
    scale_log2 = scale * _LOG2E
    acc_rd = tl.zeros([HEADS * POSITIONS, D], tl.float32)

    low, inner_low, inner_high, high = key_ranges(start_ptr, block, seq, POSITIONS, KEYS)
    for n0 in range(low, high, KEYS):
        k_nd = load_rows(k_ptr, n0, seq, ROW, D, KEYS)
        v_nd = load_rows(v_ptr, n0, seq, ROW, D, KEYS)
        s_rn = tl.dot(q_rd, tl.trans(k_nd), input_precision="ieee")
        dp_rn = tl.dot(grad_rd, tl.trans(v_nd), input_precision="ieee")
        p_rn = tl.exp2(s_rn * scale_log2 - lse_r[:, None])
        if (n0 < inner_low) | (n0 >= inner_high):
            p_rn = tl.where(between(start_r, pos_r, n0, KEYS), p_rn, 0.0)
        ds_rn = (p_rn * (dp_rn - delta_r[:, None])).to(k_nd.dtype)
        acc_rd = tl.dot(ds_rn, k_nd, acc_rd, input_precision="ieee")

    grad_qkv_ptr += batch * seq * ROW
    ptrs_rd = grad_qkv_ptr + (row_r * ROW + head_r * D)[:, None] + d[None, :]
    tl.store(ptrs_rd, (acc_rd * scale).to(grad_qkv_ptr.dtype.element_ty), mask=kept_r[:, None])


def attention_backward(
    grad_out_BSD: Tensor,
    qkv_BSD: Tensor,
    out_BSD: Tensor,
    lse_BHS: Tensor,
    start_BS: Tensor,
    last_BS: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None,
    query_tile: Tile | None = None,
    key_tile: Tile | None = None,
) -> Tensor:
    """Launch the backward; arguments are checked by the caller.

    Args:
        grad_out_BSD: see ``sink_attention_backward``, as all others.
        qkv_BSD: contiguous.
        out_BSD: of the forward.
        lse_BHS: of the forward.
        start_BS: int32.
        last_BS: int32.
        num_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: D.
        scale: of the logits.
        window: chooses the tiles.
        query_tile: in place of the table's, for tuning.
        key_tile: likewise.
    """
    kind = qkv_BSD.dtype, head_dim, window, generation(qkv_BSD)
    query_tile = query_tile or choose_tile(QUERY_TILES, *kind)
    key_tile = key_tile or choose_tile(KEY_TILES, *kind)
    if query_tile.fit(num_heads // num_kv_heads).positions % key_tile.positions:
        raise ValueError(f"{key_tile} reads rows that {query_tile} does not write")
    grad_qkv_BSD = torch.empty_like(qkv_BSD)
    heads = {"HQ": num_heads, "HKV": num_kv_heads, "D": head_dim}
    rows_2BHS = launch_queries(
        (grad_out_BSD, qkv_BSD, out_BSD, lse_BHS, start_BS), grad_qkv_BSD, heads, scale, query_tile
    )
    launch_keys((grad_out_BSD, qkv_BSD, rows_2BHS, last_BS), grad_qkv_BSD, heads, scale, key_tile)
    return grad_qkv_BSD


def launch_queries(
    tensors: tuple[Tensor, ...],
    grad_qkv_BSD: Tensor,
    heads: dict[str, int],
    scale: float,
    tile: Tile,
) -> Tensor:
    """Fill the queries' columns of ``grad_qkv_BSD``, and return the rows' numbers.

    Args:
        tensors: the output's gradient, qkv, the output, its logarithms, and ``start_BS``.
        grad_qkv_BSD: to write to.
        heads: HQ, HKV and D.
        scale: of the logits.
        tile: of a program.
    """
    batch, seq, _ = grad_qkv_BSD.shape
    tile = tile.fit(heads["HQ"] // heads["HKV"])
    blocks = triton.cdiv(seq, tile.positions)
    rows_2BHS = tensors[3].new_empty(2, batch, heads["HQ"], blocks * tile.positions)
    query_kernel[heads["HQ"] // tile.heads, blocks, batch](
        *tensors,
        grad_qkv_BSD,
        rows_2BHS,
        seq,
        rows_2BHS.shape[-1],
        scale,
        **heads,
        **tile_arguments(tile),
    )
    return rows_2BHS
