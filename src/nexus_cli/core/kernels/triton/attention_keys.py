"""Triton gradients of keys and values, the second part of the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nexus_cli.core.kernels.triton.attention import LOG2E, Tile, Tiles, between, load_rows

_LOG2E = tl.constexpr(LOG2E)

# Here `heads` counts the query heads of a step, always one, and `positions` its queries.
KEY_TILES = Tiles(
    full=Tile(1, 64, 64, 4, 2),
    narrow=Tile(1, 64, 64, 4, 2),
    large=Tile(1, 32, 64, 4, 2),
    old=Tile(1, 32, 64, 4, 2),
)
# Below this many programs for keys and values the query heads of a group are split up.
ENOUGH_PROGRAMS = 264  # two on each multiprocessor of an H100
SUM_BLOCK = 2048


@triton.jit(do_not_specialize=["seq"])
def key_kernel(
    grad_ptr,
    qkv_ptr,
    rows_ptr,
    last_ptr,
    result_ptr,
    seq,
    padded,
    scale,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    RESULT_ROW: tl.constexpr,
    RESULT_COLUMN: tl.constexpr,
    POSITIONS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of one block of keys and values, from ``Hq / Hkv / SPLIT`` query heads.

    Rows of the result are ``RESULT_ROW`` long; the keys' gradients begin at ``RESULT_COLUMN``,
    the values' right after them. With ``SPLIT > 1`` the result is ``[SPLIT, B, S, 2 Hkv D]``.

    Grid: (Hkv * SPLIT, blocks of keys, B). The keys with the most queries come first.
    """
    ROW: tl.constexpr = (HQ + 2 * HKV) * D
    PER: tl.constexpr = HQ // HKV // SPLIT
    kv_head = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    block = tl.program_id(1) * KEYS
    batch = tl.program_id(2).to(tl.int64)
    first_head = (kv_head * SPLIT + part) * PER
    qkv_ptr += batch * seq * ROW
    last_ptr += batch * seq
    q_ptr = qkv_ptr + first_head * D
    grad_ptr += batch * seq * HQ * D + first_head * D
    lse_ptr = rows_ptr + (batch * HQ + first_head) * padded
    delta_ptr = lse_ptr + tl.num_programs(2).to(tl.int64) * HQ * padded
    scale_log2 = scale * _LOG2E

    key_n = block + tl.arange(0, KEYS)
    d = tl.arange(0, D)
    last_n = tl.load(last_ptr + tl.minimum(key_n, seq - 1))  # rows past the end are not kept
    k_nd = load_rows(qkv_ptr + (HQ + kv_head) * D, block, seq, ROW, D, KEYS)
    v_nd = load_rows(qkv_ptr + (HQ + HKV + kv_head) * D, block, seq, ROW, D, KEYS)
    dk_nd = tl.zeros([KEYS, D], tl.float32)
    dv_nd = tl.zeros([KEYS, D], tl.float32)

    # Queries of [inner_low, inner_high) see every key of the block: only the others need the mask,
    # behind a branch (see the forward). Steps run over positions and, fastest, heads, in one loop,
    # so that loads are ahead across heads.
    low = block // POSITIONS * POSITIONS
    end = tl.minimum(block + KEYS, seq)
    high = tl.load(last_ptr + end - 1) + 1
    inner_low = tl.cdiv(block + KEYS - 1, POSITIONS) * POSITIONS
    inner_high = (tl.load(last_ptr + block) + 1) // POSITIONS * POSITIONS
    inner_high = tl.maximum(inner_high, inner_low)
    for i in range(0, tl.cdiv(high - low, POSITIONS) * PER):
        m0 = tl.multiple_of(low + i // PER * POSITIONS, POSITIONS)
        head = i % PER
        m = m0 + tl.arange(0, POSITIONS)
        q_md = load_rows(q_ptr + head * D, m0, seq, ROW, D, POSITIONS)
        grad_md = load_rows(grad_ptr + head * D, m0, seq, HQ * D, D, POSITIONS)
        lse_m = tl.load(lse_ptr + head * padded + m)
        delta_m = tl.load(delta_ptr + head * padded + m)
        # Transposed, keys x queries, so that p and ds are first operands as they are.
        s_nm = tl.dot(k_nd, tl.trans(q_md), input_precision="ieee")
        dp_nm = tl.dot(v_nd, tl.trans(grad_md), input_precision="ieee")
        p_nm = tl.exp2(s_nm * scale_log2 - lse_m[None, :])
        if (m0 < inner_low) | (m0 >= inner_high):
            p_nm = tl.where(between(key_n, last_n, m0, POSITIONS), p_nm, 0.0)
        dv_nd = tl.dot(p_nm.to(grad_md.dtype), grad_md, dv_nd, input_precision="ieee")
        ds_nm = (p_nm * (dp_nm - delta_m[None, :])).to(q_md.dtype)
        dk_nd = tl.dot(ds_nm, q_md, dk_nd, input_precision="ieee")

    result_ptr += (part * tl.num_programs(2) + batch) * seq * RESULT_ROW
    result_ptr += RESULT_COLUMN + kv_head * D
    ptrs_nd = result_ptr + (key_n * RESULT_ROW)[:, None] + d[None, :]
    kept_n1 = (key_n < seq)[:, None]
    tl.store(ptrs_nd, (dk_nd * scale).to(result_ptr.dtype.element_ty), mask=kept_n1)
    tl.store(ptrs_nd + HKV * D, dv_nd.to(result_ptr.dtype.element_ty), mask=kept_n1)


@triton.jit
def sum_kernel(
    part_ptr,
    grad_qkv_ptr,
    numel,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``grad_qkv[row, COLUMN + c] = sum_split part[split, row, c]``, in the order of the parts."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = i < numel
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(part_ptr + split * numel + i, mask=kept, other=0.0)
    ptrs = grad_qkv_ptr + i // COLUMNS * ROW + COLUMN + i % COLUMNS
    tl.store(ptrs, total.to(grad_qkv_ptr.dtype.element_ty), mask=kept)


def launch_keys(
    tensors: tuple[Tensor, ...],
    grad_qkv_BSD: Tensor,
    heads: dict[str, int],
    scale: float,
    tile: Tile,
) -> None:
    """Fill the keys' and values' columns of ``grad_qkv_BSD``.

    Args:
        tensors: the output's gradient, qkv, the rows' numbers of the query launch
            ``[2, B, Hq, padded]``, and ``last_BS``.
        grad_qkv_BSD: to write to.
        heads: HQ, HKV and D.
        scale: of the logits.
        tile: its positions divide ``padded``.
    """
    batch, seq, row = grad_qkv_BSD.shape
    columns = 2 * heads["HKV"] * heads["D"]
    column = heads["HQ"] * heads["D"]
    blocks = triton.cdiv(seq, tile.keys)
    split = key_split(batch * heads["HKV"] * blocks, heads["HQ"] // heads["HKV"])
    if split == 1:
        result, result_row, result_column = grad_qkv_BSD, row, column
    else:
        result = torch.empty(
            split, batch, seq, columns, dtype=torch.float32, device=grad_qkv_BSD.device
        )
        result_row, result_column = columns, 0
    key_kernel[heads["HKV"] * split, blocks, batch](
        *tensors,
        result,
        seq,
        tensors[2].shape[-1],
        scale,
        **heads,
        SPLIT=split,
        RESULT_ROW=result_row,
        RESULT_COLUMN=result_column,
        POSITIONS=tile.positions,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split > 1:
        numel = batch * seq * columns
        sum_kernel[(triton.cdiv(numel, SUM_BLOCK),)](
            result,
            grad_qkv_BSD,
            numel,
            SPLIT=split,
            COLUMNS=columns,
            ROW=row,
            COLUMN=column,
            BLOCK=SUM_BLOCK,
        )


def key_split(programs: int, group: int) -> int:
    """Into how many parts a group's query heads are split: a power of two that divides them."""
    split = 1
    while programs * split < ENOUGH_PROGRAMS and group % (2 * split) == 0:
        split *= 2
    return split
