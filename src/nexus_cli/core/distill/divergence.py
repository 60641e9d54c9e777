"""KL of one chunk of positions and its gradient, for a dense and for a top-K teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_cli.core.distill.projection import project
from nexus_cli.core.distill.teacher import DenseSignal, TeacherSignal, TopKSignal

# Shape letters in this file: C positions of one chunk, V vocabulary, K teacher entries kept for
# each position; signals here hold the chunk's positions only.


@dataclass(frozen=True)
class Divergence:
    """KL of every position and its gradient.

    Attributes:
        kl_C: ``KL(teacher || student)`` in nats at the temperature asked ``[C]``, not yet x T^2.
        gradient_CV: its gradient with respect to ``logits / T`` ``[C, V]``.
        entropy_C: the teacher's entropy in nats ``[C]``, if metrics were asked for.
        agreement_C: whether the likeliest tokens agree ``[C]``, likewise.
    """

    kl_C: Tensor
    gradient_CV: Tensor
    entropy_C: Tensor | None = None
    agreement_C: Tensor | None = None


def vocabulary_divergence(
    logq_CV: Tensor,
    signal: TeacherSignal,
    head_VH: Tensor,
    *,
    temperature: float,
    metrics: bool = False,
) -> Divergence:
    """KL(teacher || student) over the vocabulary.

    Args:
        logq_CV: the student's log-probabilities at this temperature ``[C, V]``, float32 or
            float64. Overwritten: it holds the probabilities afterwards.
        signal: the teacher at the same positions; a top-K one at this same temperature.
        head_VH: the frozen head ``[V, H]``, for a dense teacher.
        temperature: divides the logits of a dense teacher.
        metrics: fill in ``entropy_C`` and ``agreement_C``.
    """
    top1_C = logq_CV.argmax(-1) if metrics else None
    if isinstance(signal, TopKSignal):
        return _topk_divergence(logq_CV, signal, top1_C)
    return _dense_divergence(logq_CV, signal, head_VH, temperature, top1_C)


def _dense_divergence(
    logq_CV: Tensor,
    signal: DenseSignal,
    head_VH: Tensor,
    temperature: float,
    student_top1_C: Tensor | None,
) -> Divergence:
    """Full-vocabulary KL, over differences: equal hidden states give exactly 0, gradient too."""
    teacher_CV = project(signal.hidden_NH, head_VH)
    if temperature != 1.0:
        teacher_CV.div_(temperature)
    logp_CV = torch.log_softmax(teacher_CV, dim=-1)
    del teacher_CV
    p_CV = logp_CV.exp()
    entropy_C = agreement_C = None
    if student_top1_C is not None:
        entropy_C = -torch.einsum("cv,cv->c", p_CV, logp_CV)
        agreement_C = logp_CV.argmax(-1) == student_top1_C
    kl_C = logp_CV.sub_(logq_CV).mul_(p_CV).sum(-1)
    del logp_CV
    return Divergence(kl_C, p_CV.neg_().add_(logq_CV.exp_()), entropy_C, agreement_C)


def _topk_divergence(
    logq_CV: Tensor, signal: TopKSignal, student_top1_C: Tensor | None
) -> Divergence:
    """KL over the K entries and one bucket for the rest.

    With S the stored ids and P, Q the tail masses of teacher and student:
    ``KL = sum_S p (ln p - ln q) + P (ln P - ln Q)``, and its gradient is ``q - p`` on S and
    ``q (1 - P / Q)`` elsewhere. Q is summed over the tail itself: ``1 - sum_S q`` would cancel.
    """
    ids_CK, logp_CK, used_CK = _fill_unused(signal, logq_CV.dtype)
    p_CK = logp_CK.exp()
    logq_CK = logq_CV.gather(1, ids_CK)
    q_CV = logq_CV.exp_()
    gradient_CV = q_CV.scatter(1, ids_CK, 0.0)
    student_tail_C = gradient_CV.sum(-1).clamp_min(torch.finfo(q_CV.dtype).tiny)
    teacher_logtail_C = signal.tail_logprob_N.to(q_CV.dtype)
    teacher_tail_C = teacher_logtail_C.exp()

    kept_C = torch.where(used_CK, p_CK * (logp_CK - logq_CK), 0.0).sum(-1)
    rest_C = teacher_tail_C * (teacher_logtail_C - student_tail_C.log())
    kl_C = kept_C + torch.where(teacher_tail_C == 0, 0.0, rest_C)  # a tail of NaN stays one

    gradient_CV.mul_((1.0 - teacher_tail_C / student_tail_C)[:, None])
    gradient_CV.scatter_(1, ids_CK, logq_CK.exp() - p_CK)
    if student_top1_C is None:
        return Divergence(kl_C, gradient_CV)
    entropies_CK = torch.where(used_CK, torch.special.entr(p_CK), 0.0)
    entropy_C = entropies_CK.sum(-1) + torch.special.entr(teacher_tail_C)
    teacher_top1_C = ids_CK.gather(1, logp_CK.argmax(-1, keepdim=True))[:, 0]
    return Divergence(kl_C, gradient_CV, entropy_C, teacher_top1_C == student_top1_C)


def _fill_unused(signal: TopKSignal, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and the used entries, with unused ones made copies of a used one.

    Writing an entry twice with the same value changes nothing, so the scatters above need no
    mask and stay deterministic. Every row has at least one used entry.
    """
    used_CK = signal.logprobs_NK > -torch.inf
    first_C1 = used_CK.to(torch.int8).argmax(-1, keepdim=True)
    ids_CK = torch.where(used_CK, signal.ids_NK, signal.ids_NK.gather(1, first_C1))
    logp_CK = torch.where(used_CK, signal.logprobs_NK, signal.logprobs_NK.gather(1, first_C1))
    return ids_CK, logp_CK.to(dtype), used_CK
