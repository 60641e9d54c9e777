"""Exact top K, log-sum-exp and tails of float32 logits that are read once.

Reading leaves the largest logit of every 64 and their sums of exponentials at the temperatures 1,
2 and 4 (``TAIL_TEMPERATURES``), all from one exponential: that at 4 squared is that at 2. The K
largest logits lie in the K blocks whose largest are largest (of equal ones, in the blocks further
left), so one program a row picks those blocks, and another picks K of their 64 K logits. Both look
for the K-th largest value bit by bit, counting: 32 counts of registers cost less than sorting
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape letters in this file: C positions of a chunk, V vocabulary, B blocks of 64, K kept,
# T temperatures of the tails, in their order.

BLOCKS_A_PROGRAM = 64
KEYS_A_WARP = 512  # 16 a thread: counting them 32 times wants registers, and many rows at once
WIDTH: tl.constexpr = tl.constexpr(64)

_LOG2E_4: tl.constexpr = tl.constexpr(1.4426950408889634 / 4)
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # finite: -inf minus itself is not a number
_LEAST: tl.constexpr = tl.constexpr(-0x80000000)
_NOWHERE: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ordered(value):
    """An int32 that is larger where the float is; more than _LEAST for any number."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0 equals 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _chosen(key, K):
    """Which K entries of ``key [N]`` are largest; of equal ones, the first. And their places.

    The K-th largest key is the largest t with at least K keys not under it.
    """
    threshold = tl.full((), 0, tl.int64)  # counted from _LEAST
    for step in range(32):
        trial = threshold + (tl.full((), 0x80000000, tl.int64) >> step)
        enough = tl.sum((key >= (trial - 0x80000000).to(tl.int32)).to(tl.int32), 0) >= K
        threshold = tl.where(enough, trial, threshold)
    bound = (threshold - 0x80000000).to(tl.int32)
    above = key > bound
    level = key == bound
    missing = K - tl.sum(above.to(tl.int32), 0)
    # One scan counts both kinds: those above in the high half, those level with it in the low.
    rank = tl.cumsum((above.to(tl.int32) << 16) + level.to(tl.int32), 0)
    seen = rank & 0xFFFF
    taken = above | (level & (seen <= missing))
    return taken, (rank >> 16) + tl.minimum(seen, missing) - 1


@triton.jit
def _powers(difference):
    """Exponentials of a difference of logits at the temperatures 1, 2 and 4."""
    fourth = tl.exp2(difference * _LOG2E_4)
    second = fourth * fourth
    return second * second, second, fourth


@triton.jit
def block_kernel(logits, tops, sums, programs, vocabulary, blocks, BLOCK_B: tl.constexpr):
    """Largest logit of each block of one row, and the sums of exponentials relative to it.

    ``sums [C, T, B]``.
    """
    row = tl.program_id(0) // programs
    block = (tl.program_id(0) % programs) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    source = logits + row.to(tl.int64) * vocabulary + column
    value = tl.load(source, column < vocabulary, float("-inf"))
    top = tl.maximum(tl.max(value, 1), _LOWEST)
    first, second, fourth = _powers(value - top[:, None])
    tl.store(tops + row * blocks + block, top, block < blocks)
    target = sums + row * (3 * blocks) + block
    tl.store(target, tl.sum(first, 1), block < blocks)
    tl.store(target + blocks, tl.sum(second, 1), block < blocks)
    tl.store(target + 2 * blocks, tl.sum(fourth, 1), block < blocks)


@triton.jit
def choose_blocks_kernel(tops, sums, chosen, rests, blocks, K: tl.constexpr, BLOCK: tl.constexpr):
    """The K best blocks of one row, ascending, and what the others add to the sums.

    ``rests [2 + T, C]``: 0 log-sum-exp of the row less its largest logit, 1 largest logit of the
    other blocks, then their sums of exponentials relative to it.
    """
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    place = tl.arange(0, BLOCK)
    inside = place < blocks
    top = tl.load(tops + row * blocks + place, inside, _LOWEST)
    taken, rank = _chosen(tl.where(inside, _ordered(top), _LEAST), K)
    tl.store(chosen + row * K + rank, place, taken)
    source = sums + row * (3 * blocks) + place
    total = tl.load(source, inside, 0.0)
    best = tl.max(top, 0)
    tl.store(rests + row, tl.log(tl.sum(total * tl.exp(top - best), 0)))
    left = inside & (taken == 0)
    rest = tl.where(left, top, _LOWEST)
    rest_top = tl.max(rest, 0)
    first, second, fourth = _powers(rest - rest_top)
    target = rests + rows + row
    tl.store(target, rest_top)
    tl.store(target + rows, tl.sum(tl.where(left, total * first, 0.0), 0))
    total = tl.load(source + blocks, left, 0.0)
    tl.store(target + 2 * rows, tl.sum(total * second, 0))
    total = tl.load(source + 2 * blocks, left, 0.0)
    tl.store(target + 3 * rows, tl.sum(total * fourth, 0))


@triton.jit
def choose_logits_kernel(
    logits,
    chosen,
    rests,
    ids,
    values,
    tails,
    vocabulary,
    B: tl.constexpr,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The K best logits in the chosen blocks of one row, in the order of their ids, and the tail.

    ``tails [1 + T, C]``: the largest logit of all but these K, and the sums of exponentials of
    all but these K relative to it: sums of positive terms.
    """
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    place = tl.arange(0, BLOCK_B * WIDTH)
    held = place // WIDTH < B
    block = tl.load(chosen + row * B + place // WIDTH, held, 0)
    column = block * WIDTH + place % WIDTH
    inside = held & (column < vocabulary)
    value = tl.load(logits + row.to(tl.int64) * vocabulary + column, inside, float("-inf"))
    taken, rank = _chosen(tl.where(inside, _ordered(value), _LEAST), K)
    tl.store(ids + row * K + rank, column, taken)
    tl.store(values + row * K + rank, value, taken)
    source = rests + rows + row
    rest_top = tl.load(source)
    left = tl.where(taken, float("-inf"), value)
    top = tl.maximum(tl.max(left, 0), rest_top)
    first, second, fourth = _powers(left - top)
    rest_first, rest_second, rest_fourth = _powers(rest_top - top)
    target = tails + row
    tl.store(target, top)
    rest = tl.load(source + rows) * rest_first
    tl.store(target + rows, tl.sum(first, 0) + rest)
    rest = tl.load(source + 2 * rows) * rest_second
    tl.store(target + 2 * rows, tl.sum(second, 0) + rest)
    rest = tl.load(source + 3 * rows) * rest_fourth
    tl.store(target + 3 * rows, tl.sum(fourth, 0) + rest)


@triton.jit
def finish_kernel(
    logits,
    labels,
    found,
    values,
    rests,
    tails,
    ids,
    logprobs,
    tail_sums,
    nlls,
    vocabulary,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sort one row's K entries, and turn everything into logarithms of probabilities.

    ``tail_sums [C, T]``.
    """
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    place = tl.arange(0, BLOCK_K)
    value = tl.load(values + row * K + place, place < K, float("-inf"))
    token = tl.load(found + row * K + place, place < K, _NOWHERE)
    key = (_ordered(value).to(tl.int64) << 32) + (0x7FFFFFFF - token).to(tl.int64)
    key = tl.sort(tl.where(place < K, key, -0x8000000000000000), descending=True)
    ordered = (key >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    token = 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32)
    best = tl.max(tl.where(place == 0, value, float("-inf")), 0)
    log_sum = tl.load(rests + row)
    tl.store(ids + row * K + place, token.to(tl.int64), place < K)
    tl.store(logprobs + row * K + place, (value - best) - log_sum, place < K)
    top = (tl.load(tails + row) - best) - log_sum
    scale = 1.0
    for index in tl.static_range(3):
        total = tl.load(tails + (index + 1) * rows + row)
        tl.store(tail_sums + row * 3 + index, top * scale + tl.log(total))
        scale *= 0.5
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocabulary)
    logit = tl.load(logits + row.to(tl.int64) * vocabulary + label, valid, float("nan"))
    tl.store(nlls + row, (best - logit) + log_sum)


def warps_for(keys: int) -> int:
    """Warps of a program that holds this many keys, a power of two."""
    return int(min(max(keys // KEYS_A_WARP, 1), 16))


def top_k_of_logits(
    logits_CV: Tensor, labels_C: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`nexus_cli.core.kernels.head_top_k.top_k_of_logits`."""
    rows, vocabulary = logits_CV.shape
    blocks = triton.cdiv(vocabulary, WIDTH.value)
    kept = min(k, blocks)
    programs = triton.cdiv(blocks, BLOCKS_A_PROGRAM)
    tops_CB = logits_CV.new_empty(rows, blocks)
    sums_CTB = logits_CV.new_empty(rows, 3, blocks)
    chosen_CB = logits_CV.new_empty(rows, kept, dtype=torch.int32)
    rests_5C = logits_CV.new_empty(5, rows)
    tails_4C = logits_CV.new_empty(4, rows)
    found_CK = logits_CV.new_empty(rows, k, dtype=torch.int32)
    values_CK = logits_CV.new_empty(rows, k)
    ids_CK = logits_CV.new_empty(rows, k, dtype=torch.int64)
    logprobs_CK = logits_CV.new_empty(rows, k)
    tails_CT, nll_C = logits_CV.new_empty(rows, 3), logits_CV.new_empty(rows)
    block_kernel[(rows * programs,)](
        logits_CV, tops_CB, sums_CTB, programs, vocabulary, blocks,
        BLOCK_B=BLOCKS_A_PROGRAM, num_warps=4,
    )  # fmt: skip
    width = triton.next_power_of_2(blocks)
    choose_blocks_kernel[(rows,)](
        tops_CB, sums_CTB, chosen_CB, rests_5C, blocks,
        K=kept, BLOCK=width, num_warps=warps_for(width),
    )  # fmt: skip
    width = triton.next_power_of_2(kept)
    choose_logits_kernel[(rows,)](
        logits_CV, chosen_CB, rests_5C, found_CK, values_CK, tails_4C, vocabulary,
        B=kept, K=k, BLOCK_B=width, num_warps=warps_for(width * WIDTH.value),
    )  # fmt: skip
    finish_kernel[(rows,)](
        logits_CV, labels_C, found_CK, values_CK, rests_5C, tails_4C,
        ids_CK, logprobs_CK, tails_CT, nll_C, vocabulary,
        K=k, BLOCK_K=triton.next_power_of_2(k), num_warps=1,
    )  # fmt: skip
    return ids_CK, logprobs_CK, tails_CT, nll_C
