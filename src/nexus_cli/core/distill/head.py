"""Cross entropy and vocabulary divergence from hidden states, never holding ``[N, V]`` logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nexus_cli.core.distill.divergence import (
    DivergenceKind,
    TeacherView,
    require_dense,
    vocabulary_divergence,
)
from nexus_cli.core.distill.kernel_chunks import KernelChunks, backproject, takes_kernels
from nexus_cli.core.distill.projection import project
from nexus_cli.core.distill.teacher import DenseSignal, TeacherSignal, TopKSignal
from nexus_cli.core.kernels.head_loss import Kept

# Shape letters in this file: N positions, C active positions of one chunk, H hidden size,
# V vocabulary, K teacher entries kept for each position.


@dataclass(frozen=True)
class HeadLoss:
    """The loss of all positions together, and its parts position by position.

    A position is active if one of its weights is not zero. Everywhere else the parts are zero.

    Attributes:
        total: ``sum_n ce_weight_n CE_n + kd_weight_n T^2 D_n``, a scalar; differentiable with
            respect to the hidden states only.
        ce_N: cross entropy in nats of every active position ``[N]``, detached.
        kd_N: ``T^2 D``, the divergence asked for, where ``kd_weight`` is not zero ``[N]``,
            detached.
        entropy_N: the teacher's entropy in nats at this temperature ``[N]``, over K + 1 entries
            for a top-K teacher; ``None`` unless metrics were asked for.
        agreement_N: 1.0 where teacher and student have the same likeliest token ``[N]``; ``None``
            unless metrics were asked for.
    """

    total: Tensor
    ce_N: Tensor
    kd_N: Tensor
    entropy_N: Tensor | None = None
    agreement_N: Tensor | None = None


def head_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    ce_weight_N: Tensor,
    kd_weight_N: Tensor,
    teacher: TeacherSignal | None,
    *,
    temperature: float = 1.0,
    chunk_size: int = 256,
    metrics: bool = False,
    divergence: DivergenceKind = "forward",
    jsd_beta: float = 0.5,
) -> HeadLoss:
    """Weighted cross entropy plus a weighted ``T^2 D(teacher, student)``.

    D is ``KL(teacher || student)``, or what ``divergence`` names
    (:func:`~nexus_cli.core.distill.divergence.vocabulary_divergence` has the formulas).

    The head is frozen, so no weight gradient is needed: the gradient of the logits is turned
    into the gradient of the hidden states chunk by chunk, in the forward pass. Beyond the
    ``[N, H]`` gradient, memory depends on ``chunk_size`` and not on the number of positions: at
    most four float32 ``[chunk_size, V]`` buffers. Inactive positions cost nothing.

    A bfloat16 head on a CUDA device takes the kernels of
    :func:`~nexus_cli.core.kernels.head_loss.head_loss_chunk`, if the divergence is ``forward``:
    at most two float32 buffers and a bfloat16 one, kept for all chunks. Any other divergence,
    head or device takes the PyTorch form below.

    The caller puts masks and ``1 / global count`` into the weights. Sources: Hinton et al.,
    arXiv 1503.02531 (temperature); the tail bucket is derived in ``docs/losses.md``.

    Args:
        hidden_NH: the student's final hidden states ``[N, H]``, any float dtype.
        head_VH: the frozen head ``[V, H]``. The products run in its dtype, the softmax in
            float32 (in float64 if the head is float64).
        labels_N: target token of every position ``[N]``, int64. Not read where inactive.
        ce_weight_N: weight of the cross entropy ``[N]``.
        kd_weight_N: weight of the divergence ``[N]``.
        teacher: what the teacher says of the same positions, or ``None``.
        temperature: divides both models' logits in the divergence; its square multiplies it.
        chunk_size: positions a chunk.
        metrics: also return the teacher's entropy and the agreement (two more passes).
        divergence: ``forward``, or for a dense teacher ``reverse`` or ``jsd``.
        jsd_beta: beta of ``jsd``, in (0, 1).

    Raises:
        ValueError: if the lengths differ, a KL weight has no teacher, the tail of a top-K teacher
            is not known at this temperature or it is asked for another divergence, or
            ``jsd_beta`` is not between 0 and 1.
    """
    _check(hidden_NH, (labels_N, ce_weight_N, kd_weight_N), teacher, divergence)
    if not 0 < jsd_beta < 1:
        raise ValueError(f"beta of the JSD must lie between 0 and 1, not {jsd_beta:g}")
    settings = _Settings(
        temperature, chunk_size, metrics and teacher is not None, divergence, jsd_beta
    )
    with torch.no_grad():
        view = _view(teacher, temperature)
        kd_active_N = kd_weight_N != 0
        ce_only_N = (ce_weight_N != 0) & ~kd_active_N
        groups = (ce_only_N.nonzero()[:, 0], kd_active_N.nonzero()[:, 0])
    if teacher is None and len(groups[1]):
        raise ValueError("a KL weight is not zero, but there is no teacher")
    total, *parts = _HeadLossFunction.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head_VH, labels_N, ce_weight_N, kd_weight_N, view, groups, settings
    )
    loss = HeadLoss(total, *parts)
    return loss if settings.metrics else replace(loss, entropy_N=None, agreement_N=None)


@dataclass(frozen=True)
class _Settings:
    temperature: float
    chunk_size: int
    metrics: bool
    divergence: DivergenceKind
    jsd_beta: float


class _HeadLossFunction(torch.autograd.Function):
    """Computes the gradient in the forward pass; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        labels_N: Tensor,
        ce_weight_N: Tensor,
        kd_weight_N: Tensor,
        teacher: TeacherView | None,
        groups: tuple[Tensor, Tensor],
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        dtype = torch.float64 if head_VH.dtype == torch.float64 else torch.float32
        parts_4N = torch.zeros(4, len(labels_N), dtype=dtype, device=hidden_NH.device)
        gradient_NH = torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None
        weights = (ce_weight_N.to(dtype), kd_weight_N.to(dtype))
        longest = min(settings.chunk_size, max(map(len, groups)))
        work = None
        if takes_kernels(head_VH) and settings.divergence == "forward":  # all that they know
            work = KernelChunks(longest, head_VH, settings.temperature, settings.metrics)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for rows_M, view in zip(groups, (None, teacher), strict=True):
                for start in range(0, len(rows_M), settings.chunk_size):
                    rows_C = rows_M[start : start + settings.chunk_size]
                    given = (
                        hidden_NH[rows_C],
                        head_VH,
                        labels_N[rows_C],
                        (weights[0][rows_C], weights[1][rows_C]),
                        None if view is None else _rows(view, rows_C),
                    )
                    if work is None:
                        dlogits_CV, parts_4N[:, rows_C] = _chunk(*given, settings)
                    else:
                        dlogits_CV, parts_4N[:, rows_C] = work.chunk(*given)
                    del given
                    if gradient_NH is not None:
                        dhidden_CH = backproject(dlogits_CV, head_VH)
                        gradient_NH[rows_C] = dhidden_CH.to(gradient_NH.dtype)
                    del dlogits_CV
        parts = parts_4N.unbind()
        total = (weights[0] * parts[0] + weights[1] * parts[1]).sum()
        ctx.save_for_backward(gradient_NH)
        ctx.mark_non_differentiable(*parts)
        return (total, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        scaled = None if gradient_NH is None else gradient_NH * grads[0].to(gradient_NH.dtype)
        return scaled, None, None, None, None, None, None, None


def _chunk(
    hidden_CH: Tensor,
    head_VH: Tensor,
    labels_C: Tensor,
    weights: tuple[Tensor, Tensor],
    teacher: TeacherView | None,
    settings: _Settings,
) -> tuple[Tensor, Tensor]:
    """Gradient of the logits ``[C, V]`` and (CE, T^2 D, entropy, agreement) ``[4, C]``.

    These buffers are the peak of the step, so each is overwritten or dropped when it can be.
    """
    ce_weight_C1, kd_weight_C1 = (weight_C[:, None] for weight_C in weights)
    label_C1 = labels_C[:, None]
    logits_CV = project(hidden_CH, head_VH)
    logq_CV = torch.log_softmax(logits_CV, dim=-1)
    parts_4C = logq_CV.new_zeros(4, len(labels_C))
    parts_4C[0] = -logq_CV.gather(1, label_C1)[:, 0]
    if teacher is None:
        dlogits_CV = logq_CV.exp_().mul_(ce_weight_C1)
        return _subtract_at(dlogits_CV, label_C1, ce_weight_C1), parts_4C

    temperature = settings.temperature
    if temperature == 1.0:
        softened_CV = logq_CV
    else:
        softened_CV = torch.log_softmax(logits_CV.div_(temperature), dim=-1)
        logq_CV.exp_()
    del logits_CV
    divergence = vocabulary_divergence(
        softened_CV,
        teacher,
        head_VH,
        temperature=temperature,
        metrics=settings.metrics,
        kind=settings.divergence,
        jsd_beta=settings.jsd_beta,
    )
    parts_4C[1] = divergence.value_C * temperature**2
    if divergence.entropy_C is not None and divergence.agreement_C is not None:
        parts_4C[2] = divergence.entropy_C
        parts_4C[3] = divergence.agreement_C
    # The gradient of T^2 D is T times the one with respect to logits / T. At T = 1 logq_CV is
    # softened_CV, which the divergence has turned into probabilities too.
    dlogits_CV = divergence.gradient_CV.mul_(kd_weight_C1 * temperature)
    dlogits_CV.addcmul_(logq_CV, ce_weight_C1)
    return _subtract_at(dlogits_CV, label_C1, ce_weight_C1), parts_4C


def _subtract_at(values_CV: Tensor, index_C1: Tensor, amount_C1: Tensor) -> Tensor:
    """``values_CV`` with ``amount_C1`` taken off one entry of each row, in place."""
    return values_CV.scatter_(1, index_C1, values_CV.gather(1, index_C1) - amount_C1)


def _view(teacher: TeacherSignal | None, temperature: float) -> TeacherView | None:
    """A top-K teacher at the temperature of the loss: once, and not chunk by chunk."""
    if not isinstance(teacher, TopKSignal):
        return teacher
    logprobs_NK, tail_N = teacher.at(temperature)
    return Kept(teacher.ids_NK, logprobs_NK, tail_N)


def _rows(view: TeacherView, rows_C: Tensor) -> TeacherView:
    if isinstance(view, DenseSignal):
        return DenseSignal(view.hidden_NH[rows_C])
    return Kept(view.ids_CK[rows_C], view.logprobs_CK[rows_C], view.tail_C[rows_C])


def _check(
    hidden_NH: Tensor,
    per_position: tuple[Tensor, ...],
    teacher: TeacherSignal | None,
    divergence: DivergenceKind,
) -> None:
    lengths = {len(hidden_NH), *map(len, per_position)}
    if isinstance(teacher, DenseSignal):
        lengths.add(len(teacher.hidden_NH))
    elif isinstance(teacher, TopKSignal):
        require_dense(divergence)
        lengths |= {len(teacher.ids_NK), len(teacher.logprobs_NK), len(teacher.tails_NT)}
    if len(lengths) > 1:
        raise ValueError(f"the numbers of positions differ: {sorted(lengths)}")
