"""The router's top-k, its softmax, and the gradient of both: a few tokens a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape letters in this file: T tokens, E experts, K experts a token.

LOGITS_A_PROGRAM = 2048
WARPS = 4


@triton.jit
def _key(logits, columns):
    """An int64 for each logit: a larger one for a larger logit, or an equal one further left.

    So the choice is one maximum of integers, and its index is valid whatever the logits are.
    """
    logits = tl.where(logits == 0.0, 0.0, logits)  # -0 equals 0
    bits = logits.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def top_k_kernel(
    logits,
    scores,
    experts,
    tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The best K experts of BLOCK_T tokens, and their softmax."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_E)
    places = tl.arange(0, BLOCK_K)
    inside = (rows < tokens)[:, None] & (columns < E)[None, :]
    at = logits + rows.to(tl.int64)[:, None] * E + columns[None, :]
    value = tl.load(at, inside, 0.0).to(tl.float32)
    least: tl.constexpr = -0x8000000000000000
    key = tl.where((columns < E)[None, :], _key(value, columns[None, :]), least)
    best = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for k in tl.static_range(K):
        top = tl.max(key, 1)
        key = tl.where(key == top[:, None], least, key)  # keys of a row differ
        ordered = (top >> 32).to(tl.int32)
        bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        here = (places == k)[None, :]
        best = tl.where(here, bits.to(tl.float32, bitcast=True)[:, None], best)
        column = 0x7FFFFFFF - (top & 0xFFFFFFFF).to(tl.int32)
        chosen = tl.where(here, column[:, None], chosen)
    largest = tl.max(tl.where((places == 0)[None, :], best, float("-inf")), 1)
    weight = tl.exp(best - largest[:, None])
    weight = tl.where((places < K)[None, :], weight, 0.0)
    weight /= tl.sum(weight, 1)[:, None]
    target = rows.to(tl.int64)[:, None] * K + places[None, :]
    inside_K = (rows < tokens)[:, None] & (places < K)[None, :]
    tl.store(scores + target, weight.to(scores.dtype.element_ty), inside_K)
    tl.store(experts + target, chosen, inside_K)


@triton.jit
def top_k_backward_kernel(
    grads,
    scores,
    experts,
    out,
    tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient to the logits of BLOCK_T tokens."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_E)
    inside = rows < tokens
    base = rows.to(tl.int64) * K
    dot = tl.zeros((BLOCK_T,), tl.float32)
    for k in tl.static_range(K):
        score = tl.load(scores + base + k, inside, 0.0).to(tl.float32)
        dot += score * tl.load(grads + base + k, inside, 0.0).to(tl.float32)
    result = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in tl.static_range(K):
        score = tl.load(scores + base + k, inside, 0.0).to(tl.float32)
        grad = tl.load(grads + base + k, inside, 0.0).to(tl.float32)
        expert = tl.load(experts + base + k, inside, 0)
        grad = score * (grad - dot)
        result = tl.where(columns[None, :] == expert[:, None], grad[:, None], result)
    target = out + rows.to(tl.int64)[:, None] * E + columns[None, :]
    both = inside[:, None] & (columns < E)[None, :]
    tl.store(target, result.to(out.dtype.element_ty), both)


def top_k_softmax(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`nexus_cli.core.kernels.router.top_k_softmax`."""
    tokens, num_experts = logits_TE.shape
    scores_TK = logits_TE.new_empty(tokens, k)
    experts_TK = logits_TE.new_empty(tokens, k, dtype=torch.int32)
    block_e = triton.next_power_of_2(num_experts)
    block_t = LOGITS_A_PROGRAM // block_e
    top_k_kernel[(triton.cdiv(tokens, block_t),)](
        logits_TE,
        scores_TK,
        experts_TK,
        tokens,
        E=num_experts,
        K=k,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=WARPS,
    )
    return scores_TK, experts_TK


def top_k_softmax_backward(
    grad_scores_TK: Tensor, scores_TK: Tensor, experts_TK: Tensor, num_experts: int
) -> Tensor:
    """See :func:`nexus_cli.core.kernels.router.top_k_softmax_backward`."""
    tokens, top_k = scores_TK.shape
    grad_TE = scores_TK.new_empty(tokens, num_experts)
    block_e = triton.next_power_of_2(num_experts)
    block_t = LOGITS_A_PROGRAM // block_e
    top_k_backward_kernel[(triton.cdiv(tokens, block_t),)](
        grad_scores_TK,
        scores_TK,
        experts_TK,
        grad_TE,
        tokens,
        E=num_experts,
        K=top_k,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        num_warps=WARPS,
    )
    return grad_TE
