"""Loss and gradient of logits: each of student's and teacher's is read twice, nothing else is.

The first reading leaves online sums of every slice of a row; a small kernel combines the slices
of a row, in order. The second reading writes the gradient in the dtype of the product after it.
All kernels are compiled without contracting products and sums, so that equal logits give equal
numbers whichever side of a difference they stand on: the difference is then exactly zero.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nexus_cli.core.kernels.head_loss import Kept
from nexus_cli.core.kernels.triton.head_kept import combine_kept_kernel, put_kernel, take_kernel

# Shape letters in this file: C positions of a chunk, V vocabulary, K kept entries, S slices.

DEPTH = 4
LANES = 512
TILES_A_SLICE = 10  # 20,480 logits of a row: 10 slices of 201,088, so 256 rows fill any card
PLANES = 9  # of the partial sums, named in slice_kernel
COEFFICIENTS = 6  # of the gradient, named in combine_kernel
WARPS = 4
_EXACT = {"enable_fp_fusion": False}

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # finite: -inf minus itself is not a number
_NOWHERE: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def slice_kernel(
    student,
    teacher,
    partial,
    rows,
    slices,
    vocabulary,
    inverse_temperature,
    SOFT: tl.constexpr,
    DENSE: tl.constexpr,
    METRICS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """What one slice of one row adds to the sums.

    Every lane keeps sums of its own, relative to its own maximum so far; it looks at BLOCK_D
    logits at once so that rescaling is rare. Planes of ``partial [PLANES, C, S]``:
    0 the student's largest logit, 1 its sum of exponentials, 2 the same at the temperature,
    3 the teacher's largest logit, 4 its sum at the temperature, 5 that sum weighted by
    (teacher - student) / T, 6 weighted by (teacher - its largest) / T, 7 and 8 the bits of the
    columns of the largest ones.
    """
    row = tl.program_id(0) // slices
    part = tl.program_id(0) % slices
    base = row.to(tl.int64) * vocabulary
    tile = tl.arange(0, BLOCK_D)[:, None] * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    soft = _LOG2E * inverse_temperature
    top_s = tl.full((BLOCK_L,), _LOWEST, tl.float32)
    sum_s = tl.zeros((BLOCK_L,), tl.float32)
    soft_s = tl.zeros((BLOCK_L,), tl.float32)
    top_t = tl.full((BLOCK_L,), _LOWEST, tl.float32)
    soft_t = tl.zeros((BLOCK_L,), tl.float32)
    apart = tl.zeros((BLOCK_L,), tl.float32)
    level = tl.zeros((BLOCK_L,), tl.float32)
    at_s = tl.full((BLOCK_L,), _NOWHERE, tl.int32)
    at_t = tl.full((BLOCK_L,), _NOWHERE, tl.int32)
    for number in range(TILES):
        column = (part * TILES + number) * BLOCK_D * BLOCK_L + tile
        inside = column < vocabulary
        s = tl.load(student + base + column, inside, float("-inf"))
        best = tl.max(s, 0)
        if METRICS:
            here = tl.min(tl.where(s == best[None, :], column, _NOWHERE), 0)
            at_s = tl.where(best > top_s, here, at_s)
        top = tl.maximum(top_s, best)
        past = (top_s - top) * _LOG2E
        sum_s = sum_s * tl.exp2(past) + tl.sum(tl.exp2((s - top[None, :]) * _LOG2E), 0)
        if SOFT:
            past = (top_s - top) * soft
            soft_s = soft_s * tl.exp2(past) + tl.sum(tl.exp2((s - top[None, :]) * soft), 0)
        top_s = top
        if DENSE:
            t = tl.load(teacher + base + column, inside, float("-inf"))
            best = tl.max(t, 0)
            if METRICS:
                here = tl.min(tl.where(t == best[None, :], column, _NOWHERE), 0)
                at_t = tl.where(best > top_t, here, at_t)
            top = tl.maximum(top_t, best)
            past = tl.exp2((top_t - top) * soft)
            weight = tl.exp2((t - top[None, :]) * soft)
            gap = tl.where(inside, t - s, 0.0) * inverse_temperature
            apart = apart * past + tl.sum(weight * gap, 0)
            if METRICS:
                drop = tl.where(soft_t == 0.0, 0.0, top_t - top) * inverse_temperature
                depth = tl.where(inside, t - top[None, :], 0.0) * inverse_temperature
                level = (level + soft_t * drop) * past + tl.sum(weight * depth, 0)
            soft_t = soft_t * past + tl.sum(weight, 0)
            top_t = top
    plane = rows * slices
    target = partial + row * slices + part
    top = tl.max(top_s, 0)
    tl.store(target, top)
    tl.store(target + plane, tl.sum(sum_s * tl.exp2((top_s - top) * _LOG2E), 0))
    if SOFT:
        tl.store(target + 2 * plane, tl.sum(soft_s * tl.exp2((top_s - top) * soft), 0))
    if METRICS:
        at = tl.min(tl.where(top_s == top, at_s, _NOWHERE), 0)
        tl.store(target + 7 * plane, at.to(tl.float32, bitcast=True))
    if DENSE:
        top = tl.max(top_t, 0)
        past = tl.exp2((top_t - top) * soft)
        tl.store(target + 3 * plane, top)
        tl.store(target + 4 * plane, tl.sum(soft_t * past, 0))
        tl.store(target + 5 * plane, tl.sum(apart * past, 0))
        if METRICS:
            drop = tl.where(soft_t == 0.0, 0.0, top_t - top) * inverse_temperature
            tl.store(target + 6 * plane, tl.sum((level + soft_t * drop) * past, 0))
            at = tl.min(tl.where(top_t == top, at_t, _NOWHERE), 0)
            tl.store(target + 8 * plane, at.to(tl.float32, bitcast=True))


@triton.jit
def combine_kernel(
    student,
    partial,
    labels,
    ce_weights,
    kd_weights,
    parts,
    coefficients,
    rows,
    slices,
    vocabulary,
    temperature,
    inverse_temperature,
    SOFT: tl.constexpr,
    DENSE: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row's loss ``parts [4, C]``, and what its gradient needs.

    Planes of ``coefficients [COEFFICIENTS, C]``: 0 the student's largest logit, 1 weight of its
    exponentials, 2 the same at the temperature, 3 the teacher's largest logit, 4 weight of its
    exponentials at the temperature, 5 what to take off at the label.
    """
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK_S)
    inside = place < slices
    plane = rows * slices
    source = partial + row * slices + place
    soft = _LOG2E * inverse_temperature
    tops = tl.load(source, inside, _LOWEST)
    top_s = tl.max(tops, 0)
    sums = tl.load(source + plane, inside, 0.0)
    sum_s = tl.sum(sums * tl.exp2((tops - top_s) * _LOG2E), 0)
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocabulary)
    logit = tl.load(student + row.to(tl.int64) * vocabulary + label, valid, float("nan"))
    ce_weight = tl.load(ce_weights + row)
    tl.store(parts + row, (top_s - logit) + tl.log(sum_s))
    tl.store(coefficients + row, top_s)
    tl.store(coefficients + rows + row, ce_weight / sum_s)
    tl.store(coefficients + 5 * rows + row, ce_weight)
    if DENSE:
        soft_s = sum_s
        if SOFT:
            sums = tl.load(source + 2 * plane, inside, 0.0)
            soft_s = tl.sum(sums * tl.exp2((tops - top_s) * soft), 0)
        tops_t = tl.load(source + 3 * plane, inside, _LOWEST)
        top_t = tl.max(tops_t, 0)
        past = tl.exp2((tops_t - top_t) * soft)
        soft_t = tl.sum(tl.load(source + 4 * plane, inside, 0.0) * past, 0)
        apart = tl.sum(tl.load(source + 5 * plane, inside, 0.0) * past, 0)
        # The log-sum-exps differ by little, and each is large: subtract before adding.
        gap = (top_t - top_s) * inverse_temperature + (tl.log(soft_t) - tl.log(soft_s))
        kl = apart / soft_t - gap
        tl.store(parts + rows + row, kl * (temperature * temperature))
        kd_weight = tl.load(kd_weights + row) * temperature
        tl.store(coefficients + 2 * rows + row, kd_weight / soft_s)
        tl.store(coefficients + 3 * rows + row, top_t)
        tl.store(coefficients + 4 * rows + row, kd_weight / soft_t)
        if METRICS:
            levels = tl.load(source + 6 * plane, inside, 0.0)
            softs = tl.load(source + 4 * plane, inside, 0.0)
            drop = tl.where(softs == 0.0, 0.0, tops_t - top_t) * inverse_temperature
            level = tl.sum((levels + softs * drop) * past, 0)
            tl.store(parts + 2 * rows + row, tl.log(soft_t) - level / soft_t)
            at_s = tl.load(source + 7 * plane, inside, 0.0).to(tl.int32, bitcast=True)
            at_t = tl.load(source + 8 * plane, inside, 0.0).to(tl.int32, bitcast=True)
            at_s = tl.min(tl.where(inside & (tops == top_s), at_s, _NOWHERE), 0)
            at_t = tl.min(tl.where(inside & (tops_t == top_t), at_t, _NOWHERE), 0)
            same = at_s == at_t
            tl.store(parts + 3 * rows + row, same.to(tl.float32))


@triton.jit
def gradient_kernel(
    student,
    teacher,
    labels,
    coefficients,
    out,
    rows,
    slices,
    vocabulary,
    inverse_temperature,
    SOFT: tl.constexpr,
    KD: tl.constexpr,
    DENSE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one slice of one row, from the coefficients of :func:`combine_kernel`."""
    row = tl.program_id(0) // slices
    part = tl.program_id(0) % slices
    base = row.to(tl.int64) * vocabulary
    soft = _LOG2E * inverse_temperature
    label = tl.load(labels + row)
    top_s = tl.load(coefficients + row)
    weight_s = tl.load(coefficients + rows + row)
    off = tl.load(coefficients + 5 * rows + row)
    if KD:
        soft_weight_s = tl.load(coefficients + 2 * rows + row)
    if DENSE:
        top_t = tl.load(coefficients + 3 * rows + row)
        weight_t = tl.load(coefficients + 4 * rows + row)
    for number in range(TILES):
        column = (part * TILES + number) * BLOCK + tl.arange(0, BLOCK)
        inside = column < vocabulary
        s = tl.load(student + base + column, inside, float("-inf"))
        power = tl.exp2((s - top_s) * _LOG2E)
        result = weight_s * power
        if KD:
            if SOFT:
                power = tl.exp2((s - top_s) * soft)
            pull = soft_weight_s * power
            if DENSE:
                t = tl.load(teacher + base + column, inside, float("-inf"))
                pull = pull - weight_t * tl.exp2((t - top_t) * soft)
            result = result + pull
        result = tl.where(column == label, result - off, result)
        tl.store(out + base + column, result.to(out.dtype.element_ty), inside)


def head_loss_chunk(
    logits_CV: Tensor,
    labels_C: Tensor,
    ce_weight_C: Tensor,
    kd_weight_C: Tensor,
    teacher: Tensor | Kept | None,
    out_CV: Tensor,
    temperature: float,
    metrics: bool,
) -> Tensor:
    """See :func:`nexus_cli.core.kernels.head_loss.head_loss_chunk`."""
    rows, vocabulary = logits_CV.shape
    slices = triton.cdiv(vocabulary, DEPTH * LANES * TILES_A_SLICE)
    partial_PCS = logits_CV.new_empty(PLANES, rows, slices)
    coefficients_QC = logits_CV.new_empty(COEFFICIENTS, rows)
    parts_4C = logits_CV.new_zeros(4, rows)
    dense = isinstance(teacher, Tensor)
    soft = teacher is not None and temperature != 1.0
    metrics = metrics and teacher is not None
    sizes = (rows, slices, vocabulary)
    scale = (1.0 / temperature,)
    tiles: dict[str, Any] = {"TILES": TILES_A_SLICE, "num_warps": WARPS, **_EXACT}
    small: dict[str, Any] = {"num_warps": 1, **_EXACT}
    teacher_CV = teacher if dense else logits_CV  # not read unless DENSE

    if isinstance(teacher, Kept):
        k = teacher.ids_CK.shape[1]
        kept: dict[str, Any] = {"K": k, "BLOCK_K": triton.next_power_of_2(k)}
        kept_CK = logits_CV.new_empty(rows, k)
        label_C = logits_CV.new_empty(rows)
        said = (teacher.ids_CK, teacher.logprobs_CK)
        take_kernel[(rows,)](
            logits_CV, *said, labels_C, kept_CK, label_C, vocabulary, **kept, **small
        )
    slice_kernel[(rows * slices,)](
        logits_CV, teacher_CV, partial_PCS, *sizes, *scale,
        SOFT=soft, DENSE=dense, METRICS=metrics, BLOCK_D=DEPTH, BLOCK_L=LANES, **tiles,
    )  # fmt: skip
    rest: dict[str, Any] = {"SOFT": soft, "METRICS": metrics, **small}
    rest["BLOCK_S"] = triton.next_power_of_2(slices)
    given = (labels_C, ce_weight_C, kd_weight_C)
    if isinstance(teacher, Kept):
        combine_kept_kernel[(rows,)](
            partial_PCS, *said, teacher.tail_C, kept_CK, label_C, *given, parts_4C,
            coefficients_QC, rows, slices, temperature, *scale, **kept, **rest,
        )  # fmt: skip
    else:
        combine_kernel[(rows,)](
            logits_CV, partial_PCS, *given, parts_4C, coefficients_QC, *sizes, temperature,
            *scale, DENSE=dense, **rest,
        )  # fmt: skip
    gradient_kernel[(rows * slices,)](
        logits_CV, teacher_CV, labels_C, coefficients_QC, out_CV, *sizes, *scale,
        SOFT=soft, KD=teacher is not None, DENSE=dense, BLOCK=DEPTH * LANES, **tiles,
    )  # fmt: skip
    if isinstance(teacher, Kept):
        put_kernel[(rows,)](out_CV, *said, kept_CK, vocabulary, **kept, **small)
    return parts_4C
