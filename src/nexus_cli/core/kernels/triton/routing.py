"""A stable counting sort of routed rows by expert, in three launches and without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape letters in this file: R routed rows, E experts, P experts padded to a power of two, N blocks
# of rows.

BLOCK = 128


@triton.jit
def count_kernel(experts, counts, rows, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """How many rows of each expert a block has, ``[N, P]``."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + slot, mask=slot < rows, other=-1)
    lane = tl.arange(0, PADDED)
    hits = (expert[:, None] == lane[None, :]).to(tl.int32)
    tl.store(counts + block * PADDED + lane, tl.sum(hits, 0))


@triton.jit
def scan_kernel(counts, offsets, blocks, num_experts, PADDED: tl.constexpr, STEP: tl.constexpr):
    """From counts to the row at which each block's part of each expert begins, in place."""
    lane = tl.arange(0, PADDED)
    step = tl.arange(0, STEP)
    total = tl.zeros((PADDED,), tl.int32)
    for first in range(0, blocks, STEP):
        block = first + step
        seen = block[:, None] < blocks
        part = tl.load(counts + block[:, None] * PADDED + lane[None, :], mask=seen, other=0)
        total += tl.sum(part, 0)
    ends = tl.cumsum(total, 0)
    tl.store(offsets + lane, ends, mask=lane < num_experts)
    start = ends - total
    for first in range(0, blocks, STEP):
        block = first + step
        seen = block[:, None] < blocks
        place = counts + block[:, None] * PADDED + lane[None, :]
        part = tl.load(place, mask=seen, other=0)
        before = tl.cumsum(part, 0) - part
        tl.store(place, start[None, :] + before, mask=seen)
        start += tl.sum(part, 0)


@triton.jit
def place_kernel(
    experts,
    starts,
    slots,
    rows_of_slots,
    sorted_experts,
    tokens,
    rows,
    TOP_K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write every row where it belongs; equal experts keep their order."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    seen = slot < rows
    expert = tl.load(experts + slot, mask=seen, other=-1)
    lane = tl.arange(0, PADDED)
    hits = (expert[:, None] == lane[None, :]).to(tl.int32)
    before = tl.cumsum(hits, 0) - hits
    start = tl.load(starts + block * PADDED + lane)
    row = tl.sum(hits * (before + start[None, :]), 1)
    tl.store(slots + row, slot, mask=seen)
    tl.store(rows_of_slots + slot, row, mask=seen)
    tl.store(sorted_experts + row, expert, mask=seen)
    tl.store(tokens + row, slot // TOP_K, mask=seen)


def counting_sort(
    experts_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five vectors of a :class:`~nexus_cli.core.kernels.routing.Routing`."""
    tokens, top_k = experts_TK.shape
    rows, padded = tokens * top_k, max(16, triton.next_power_of_2(num_experts))
    blocks = triton.cdiv(rows, BLOCK)
    new = experts_TK.new_empty
    slot_R, expert_R, token_R = (new(rows, dtype=torch.int32) for _ in range(3))
    row_TK = new((tokens, top_k), dtype=torch.int32)
    offsets_E = new(num_experts, dtype=torch.int32)
    counts = new((max(blocks, 1), padded), dtype=torch.int32)
    if blocks:
        count_kernel[(blocks,)](experts_TK, counts, rows, PADDED=padded, BLOCK=BLOCK)
    scan_kernel[(1,)](
        counts, offsets_E, blocks, num_experts, PADDED=padded, STEP=4096 // padded, num_warps=8
    )
    if blocks:
        place_kernel[(blocks,)](
            experts_TK, counts, slot_R, row_TK, expert_R, token_R, rows,
            TOP_K=top_k, PADDED=padded, BLOCK=BLOCK,
        )  # fmt: skip
    return slot_R, row_TK, expert_R, offsets_E, token_R
