"""The few entries of a row that a top-K teacher names; the rest of the row is the tail.

They are taken out of the logits and ``-inf`` put in their place, so that the sums over a row
are sums over the tail, without subtracting; their gradient is written at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Shape letters in this file: C positions of a chunk, V vocabulary, K kept entries, S slices.

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
_NOWHERE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_LOG_TINY: tl.constexpr = tl.constexpr(-87.33654475055310)  # log of float32's smallest normal


@triton.jit
def take_kernel(
    logits,
    ids,
    logprobs,
    labels,
    kept,
    label_logits,
    vocabulary,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Copy one row's label logit and used entries out, and put -inf where the entries were."""
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK_K)
    base = row.to(tl.int64) * vocabulary
    logprob = tl.load(logprobs + row * K + place, place < K, float("-inf"))
    used = logprob > float("-inf")
    target = logits + base + tl.load(ids + row * K + place, used, 0)
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocabulary)
    label_logit = tl.load(logits + base + label, valid, float("nan"))
    value = tl.load(target, used, float("-inf"))
    tl.store(label_logits + row, label_logit)
    tl.store(kept + row * K + place, value, place < K)
    tl.debug_barrier()  # the label may be one of the entries: read it before it is gone
    tl.store(target, tl.full((BLOCK_K,), float("-inf"), tl.float32), used)


@triton.jit
def combine_kept_kernel(
    partial,
    ids,
    logprobs,
    tails,
    kept,
    label_logits,
    labels,
    ce_weights,
    kd_weights,
    parts,
    coefficients,
    rows,
    slices,
    temperature,
    inverse_temperature,
    SOFT: tl.constexpr,
    METRICS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row's loss, its coefficients as in ``combine_kernel``, and the entries' gradient.

    ``kept`` holds the entries' logits and is overwritten by their gradient.
    """
    row = tl.program_id(0)
    soft = _LOG2E * inverse_temperature
    slot = tl.arange(0, BLOCK_S)
    inside = slot < slices
    plane = rows * slices
    source = partial + row * slices + slot
    tops = tl.load(source, inside, _LOWEST)
    top_tail = tl.max(tops, 0)
    sums = tl.load(source + plane, inside, 0.0)
    sum_tail = tl.sum(sums * tl.exp2((tops - top_tail) * _LOG2E), 0)
    soft_tail = sum_tail
    if SOFT:
        sums = tl.load(source + 2 * plane, inside, 0.0)
        soft_tail = tl.sum(sums * tl.exp2((tops - top_tail) * soft), 0)

    place = tl.arange(0, BLOCK_K)
    logprob = tl.load(logprobs + row * K + place, place < K, float("-inf"))
    used = logprob > float("-inf")
    token = tl.load(ids + row * K + place, used, -1)
    logit = tl.load(kept + row * K + place, used, float("-inf"))
    top = tl.maximum(top_tail, tl.max(logit, 0))
    power = tl.exp2((logit - top) * _LOG2E)
    share = tl.exp2((top_tail - top) * _LOG2E)
    whole = sum_tail * share + tl.sum(power, 0)
    soft_share = tl.exp2((top_tail - top) * soft)
    soft_whole = soft_tail * soft_share + tl.sum(tl.exp2((logit - top) * soft), 0)

    tail = tl.load(tails + row)
    mass = tl.exp(tail)
    p = tl.where(used, tl.exp(logprob), 0.0)
    log_whole = tl.log(soft_whole)
    logq = (logit - top) * inverse_temperature - log_whole
    logq_tail = (top_tail - top) * inverse_temperature + tl.log(soft_tail) - log_whole
    logq_tail = tl.where(soft_tail == 0.0, _LOG_TINY, logq_tail)  # nothing but the entries
    kl = tl.sum(tl.where(used, p * (logprob - logq), 0.0), 0)
    kl += tl.where(mass == 0.0, 0.0, mass * (tail - logq_tail))
    tl.store(parts + row, (top - tl.load(label_logits + row)) + tl.log(whole))
    tl.store(parts + rows + row, kl * (temperature * temperature))

    ce_weight = tl.load(ce_weights + row)
    kd_weight = tl.load(kd_weights + row) * temperature
    pull = soft_share / soft_whole - mass / soft_tail  # q (1 - P / Q), less its exponential
    pull = tl.where(soft_tail == 0.0, 0.0, pull)
    tl.store(coefficients + row, top_tail)
    tl.store(coefficients + rows + row, ce_weight * (share / whole))
    tl.store(coefficients + 2 * rows + row, kd_weight * pull)
    tl.store(coefficients + 5 * rows + row, ce_weight)
    label = tl.load(labels + row)
    gradient = ce_weight * (power / whole) + kd_weight * (tl.exp(logq) - p)
    gradient = tl.where(token == label, gradient - ce_weight, gradient)
    if METRICS:
        entropy = -tl.sum(tl.where(used, p * logprob, 0.0), 0)
        entropy -= tl.where(mass == 0.0, 0.0, mass * tail)
        tl.store(parts + 2 * rows + row, entropy)
        at = tl.load(source + 7 * plane, inside, 0.0).to(tl.int32, bitcast=True)
        at = tl.where(inside & (tops == top), at, _NOWHERE)
        best = tl.min(tl.where(logit == top, token, _NOWHERE), 0)
        best = tl.minimum(best, tl.min(at, 0))
        first = tl.min(tl.where(logprob == tl.max(logprob, 0), place, BLOCK_K), 0)
        same = tl.sum(tl.where(place == first, token, 0), 0) == best
        tl.store(parts + 3 * rows + row, same.to(tl.float32))
    tl.store(kept + row * K + place, gradient, place < K)


@triton.jit
def put_kernel(out, ids, logprobs, gradients, vocabulary, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write the gradient of one row's used entries, where the tail's kernel left nothing."""
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK_K)
    logprob = tl.load(logprobs + row * K + place, place < K, float("-inf"))
    used = logprob > float("-inf")
    token = tl.load(ids + row * K + place, used, 0)
    gradient = tl.load(gradients + row * K + place, used, 0.0)
    target = out + row.to(tl.int64) * vocabulary + token
    tl.store(target, gradient.to(out.dtype.element_ty), used)
