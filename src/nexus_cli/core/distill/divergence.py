"""Divergence of one chunk of positions and its gradient, for a dense and for a top-K teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nexus_cli.core.distill.projection import project
from nexus_cli.core.distill.teacher import DenseSignal
from nexus_cli.core.kernels.head_loss import Kept

# Shape letters in this file: C positions of one chunk, V vocabulary, K teacher entries kept for
# each position.

DivergenceKind = Literal["forward", "reverse", "jsd"]
TeacherView = DenseSignal | Kept  # of the chunk's positions; Kept at the temperature of the loss

# exp(80) is finite in float32, and a ratio beyond it leaves no trace in the mixture's logarithm.
_LARGEST_GAP = 80.0


@dataclass(frozen=True)
class Divergence:
    """The divergence of every position and its gradient.

    Attributes:
        value_C: in nats at the temperature asked ``[C]``, not yet x T^2.
        gradient_CV: its gradient with respect to ``logits / T`` ``[C, V]``.
        entropy_C: the teacher's entropy in nats ``[C]``, if metrics were asked for.
        agreement_C: whether the likeliest tokens agree ``[C]``, likewise.
    """

    value_C: Tensor
    gradient_CV: Tensor
    entropy_C: Tensor | None = None
    agreement_C: Tensor | None = None


def vocabulary_divergence(
    logq_CV: Tensor,
    teacher: TeacherView,
    head_VH: Tensor,
    *,
    temperature: float,
    metrics: bool = False,
    kind: DivergenceKind = "forward",
    jsd_beta: float = 0.5,
) -> Divergence:
    """A divergence of the teacher's ``p`` and the student's ``q`` over the vocabulary.

    ``forward`` is ``KL(p || q)`` and ``reverse`` ``KL(q || p)``. ``jsd`` is the generalised
    Jensen-Shannon divergence of GKD (arXiv 2306.13649, with the teacher as P):
    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``. So beta is the
    teacher's share of the mixture and the weight of the teacher's KL, and nothing normalises it.

    Args:
        logq_CV: the student's log-probabilities at this temperature ``[C, V]``, float32 or
            float64. Overwritten: it holds the probabilities afterwards.
        teacher: at the same positions; a top-K one at this same temperature.
        head_VH: the frozen head ``[V, H]``, for a dense teacher.
        temperature: divides the logits of a dense teacher.
        metrics: fill in ``entropy_C`` and ``agreement_C``.
        kind: which divergence; a top-K teacher knows the forward one alone.
        jsd_beta: beta of ``jsd``, in (0, 1).

    Raises:
        ValueError: a top-K teacher is asked for another divergence than ``forward``.
    """
    top1_C = logq_CV.argmax(-1) if metrics else None
    if isinstance(teacher, Kept):
        require_dense(kind)
        return _topk_divergence(logq_CV, teacher, top1_C)
    logp_CV = _teacher_logprobs(teacher, head_VH, temperature)
    return _dense_divergence(logq_CV, logp_CV, top1_C, kind, jsd_beta)


def require_dense(kind: DivergenceKind) -> None:
    """Refuse a top-K teacher for what weighs by the student's own probabilities.

    The student's mass may lie on tokens of which the teacher's top K says nothing but their sum.

    Raises:
        ValueError: ``kind`` is not ``forward``.
    """
    if kind != "forward":
        raise ValueError(f"the {kind} divergence needs a dense teacher, not a top K of one")


def _teacher_logprobs(signal: DenseSignal, head_VH: Tensor, temperature: float) -> Tensor:
    teacher_CV = project(signal.hidden_NH, head_VH)
    if temperature != 1.0:
        teacher_CV.div_(temperature)
    return torch.log_softmax(teacher_CV, dim=-1)


def _dense_divergence(
    logq_CV: Tensor,
    logp_CV: Tensor,
    student_top1_C: Tensor | None,
    kind: DivergenceKind,
    jsd_beta: float,
) -> Divergence:
    """Over the whole vocabulary; ``logp_CV`` is overwritten too.

    All three are sums over the differences ``ln p - ln q``: equal hidden states give exactly 0,
    gradient too. Logarithms stay finite where a probability underflows.
    """
    p_CV = logp_CV.exp()
    entropy_C = agreement_C = None
    if student_top1_C is not None:
        entropy_C = -_weighted(p_CV, logp_CV)
        agreement_C = logp_CV.argmax(-1) == student_top1_C
    gap_CV, q_CV = logp_CV.sub_(logq_CV), logq_CV.exp_()
    if kind == "forward":
        value_C, gradient_CV = _forward(gap_CV, p_CV, q_CV)
    elif kind == "reverse":
        value_C, gradient_CV = _reverse(gap_CV, q_CV)
    else:
        value_C, gradient_CV = _jsd(gap_CV, p_CV, q_CV, jsd_beta)
    return Divergence(value_C, gradient_CV, entropy_C, agreement_C)


def _forward(gap_CV: Tensor, p_CV: Tensor, q_CV: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(p || q)`` and ``q - p``; ``gap_CV`` and ``p_CV`` are overwritten."""
    return gap_CV.mul_(p_CV).sum(-1), p_CV.neg_().add_(q_CV)


def _reverse(gap_CV: Tensor, q_CV: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(q || p)`` and ``q (ln q - ln p - KL)``; ``gap_CV`` is overwritten."""
    value_C = -_weighted(q_CV, gap_CV)
    return value_C, gap_CV.add_(value_C[:, None]).mul_(q_CV).neg_()


def _jsd(gap_CV: Tensor, p_CV: Tensor, q_CV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` and its gradient; ``gap_CV`` is overwritten.

    With ``d = ln p - ln q`` and ``r = ln(m / q) = ln(1 + beta (e^d - 1))`` the value is
    ``beta sum p d - sum m r``, and the gradient ``(1 - beta) q (ln q - ln m - KL(q || m))``: m
    adds nothing to it, as its own derivative sums to one. Where d is large ``r - d`` has reached
    ``ln beta`` and q has vanished, so d may be capped.
    """
    gap_CV.clamp_(max=_LARGEST_GAP)
    value_C = beta * _weighted(p_CV, gap_CV)
    ratio_CV = gap_CV.expm1_().mul_(beta).log1p_()
    student_C = _weighted(q_CV, ratio_CV)  # -KL(q || m)
    value_C -= beta * _weighted(p_CV, ratio_CV) + (1 - beta) * student_C
    return value_C, ratio_CV.sub_(student_C[:, None]).mul_(q_CV).mul_(beta - 1)


def _weighted(weight_CV: Tensor, value_CV: Tensor) -> Tensor:
    """Sum of products ``[C]``, without a buffer of them."""
    return torch.einsum("cv,cv->c", weight_CV, value_CV)


def _topk_divergence(logq_CV: Tensor, kept: Kept, student_top1_C: Tensor | None) -> Divergence:
    """KL over the K entries and one bucket for the rest.

    With S the stored ids and P, Q the tail masses of teacher and student:
    ``KL = sum_S p (ln p - ln q) + P (ln P - ln Q)``, and its gradient is ``q - p`` on S and
    ``q (1 - P / Q)`` elsewhere. Q is summed over the tail itself: ``1 - sum_S q`` would cancel.
    """
    ids_CK, logp_CK, used_CK = _fill_unused(kept, logq_CV.dtype)
    p_CK = logp_CK.exp()
    logq_CK = logq_CV.gather(1, ids_CK)
    q_CV = logq_CV.exp_()
    gradient_CV = q_CV.scatter(1, ids_CK, 0.0)
    student_tail_C = gradient_CV.sum(-1).clamp_min(torch.finfo(q_CV.dtype).tiny)
    teacher_logtail_C = kept.tail_C.to(q_CV.dtype)
    teacher_tail_C = teacher_logtail_C.exp()

    kept_C = torch.where(used_CK, p_CK * (logp_CK - logq_CK), 0.0).sum(-1)
    rest_C = teacher_tail_C * (teacher_logtail_C - student_tail_C.log())
    value_C = kept_C + torch.where(teacher_tail_C == 0, 0.0, rest_C)  # a tail of NaN stays one

    gradient_CV.mul_((1.0 - teacher_tail_C / student_tail_C)[:, None])
    gradient_CV.scatter_(1, ids_CK, logq_CK.exp() - p_CK)
    if student_top1_C is None:
        return Divergence(value_C, gradient_CV)
    entropies_CK = torch.where(used_CK, torch.special.entr(p_CK), 0.0)
    entropy_C = entropies_CK.sum(-1) + torch.special.entr(teacher_tail_C)
    teacher_top1_C = ids_CK.gather(1, logp_CK.argmax(-1, keepdim=True))[:, 0]
    return Divergence(value_C, gradient_CV, entropy_C, teacher_top1_C == student_top1_C)


def _fill_unused(kept: Kept, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and the used entries, with unused ones made copies of a used one.

    Writing an entry twice with the same value changes nothing, so the scatters above need no
    mask and stay deterministic. Every row has at least one used entry.
    """
    used_CK = kept.logprobs_CK > -torch.inf
    first_C1 = used_CK.to(torch.int8).argmax(-1, keepdim=True)
    ids_CK = torch.where(used_CK, kept.ids_CK, kept.ids_CK.gather(1, first_C1))
    logp_CK = torch.where(used_CK, kept.logprobs_CK, kept.logprobs_CK.gather(1, first_C1))
    return ids_CK, logp_CK.to(dtype), used_CK
