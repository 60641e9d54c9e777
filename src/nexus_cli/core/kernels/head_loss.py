"""Loss of one chunk of logits and its gradient with respect to them, in two readings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Shape letters in this file: C positions of a chunk, V vocabulary, K kept entries.


@dataclass(frozen=True)
class Kept:
    """What a top-K teacher says of a chunk, at the temperature of the loss.

    Attributes:
        ids_CK: int64, distinct within a row where used.
        logprobs_CK: ``-inf`` marks an entry that is not used.
        tail_C: log of the mass outside the entries; ``-inf`` if none.
    """

    ids_CK: Tensor
    logprobs_CK: Tensor
    tail_C: Tensor


def head_loss_chunk(
    logits_CV: Tensor,
    labels_C: Tensor,
    ce_weight_C: Tensor,
    kd_weight_C: Tensor,
    teacher: Tensor | Kept | None,
    out_CV: Tensor,
    *,
    temperature: float = 1.0,
    metrics: bool = False,
) -> Tensor:
    """Cross entropy, ``T^2 KL(teacher || student)``, and the gradient of their weighted sum.

    The gradient is exactly zero, and so is the KL, where the teacher's logits equal the
    student's. A tail of the student is summed over itself, so it may be of any size.

    Args:
        logits_CV: the student's, float32, contiguous. Destroyed.
        labels_C: int64. One outside the vocabulary makes the row's cross entropy NaN on a GPU.
        ce_weight_C: weight of the cross entropy, in the dtype of the logits, as all floats here.
        kd_weight_C: weight of the KL; not read without a teacher.
        teacher: its logits ``[C, V]``, its top K, or nothing.
        out_CV: receives the gradient; any float dtype.
        temperature: divides both models' logits in the KL.
        metrics: also fill the last two parts.

    Returns:
        Cross entropy, ``T^2 KL``, the teacher's entropy in nats, and 1.0 where the likeliest
        tokens are the same (of equal ones the first): ``[4, C]``, zero where not asked for.

    Raises:
        ValueError: if shapes, dtypes, devices or strides do not fit.
    """
    tensors = [logits_CV, labels_C, ce_weight_C, kd_weight_C, out_CV]
    if isinstance(teacher, Kept):
        tensors += [teacher.ids_CK, teacher.logprobs_CK, teacher.tail_C]
        if not len(labels_C) == len(teacher.tail_C) == len(teacher.ids_CK):
            raise ValueError("the teacher speaks of another number of positions")
        if teacher.ids_CK.shape != teacher.logprobs_CK.shape:
            raise ValueError("ids and log-probabilities differ in shape")
    elif teacher is not None:
        tensors.append(teacher)
        if teacher.shape != logits_CV.shape:
            raise ValueError("the teacher's logits differ in shape")
    if not len(logits_CV) == len(labels_C) == len(ce_weight_C) == len(kd_weight_C):
        raise ValueError("the numbers of positions differ")
    if out_CV.shape != logits_CV.shape:
        raise ValueError("the gradient has another shape than the logits")
    _check_floats(logits_CV, [t for t in tensors if t is not out_CV and t is not logits_CV])
    given = (logits_CV, labels_C, ce_weight_C, kd_weight_C, teacher, out_CV, temperature, metrics)
    if _on_gpu(tensors):
        from nexus_cli.core.kernels.triton import head_loss as kernels

        return kernels.head_loss_chunk(*given)
    return head_loss_chunk_torch(*given)


def head_loss_chunk_torch(
    logits_CV: Tensor,
    labels_C: Tensor,
    ce_weight_C: Tensor,
    kd_weight_C: Tensor,
    teacher: Tensor | Kept | None,
    out_CV: Tensor,
    temperature: float = 1.0,
    metrics: bool = False,
) -> Tensor:
    """:func:`head_loss_chunk` by its definition and autograd; any device, any float dtype."""
    with torch.enable_grad():
        student_CV = logits_CV.detach().requires_grad_()
        ce_C = torch.nn.functional.cross_entropy(student_CV, labels_C, reduction="none")
        parts = [ce_C, *(torch.zeros_like(ce_C) for _ in range(3))]
        total = (ce_weight_C * ce_C).sum()
        if teacher is not None:
            if isinstance(teacher, Kept):
                logp_CB, logq_CB, top1_C = _buckets(student_CV / temperature, teacher)
            else:
                logp_CB = torch.log_softmax(teacher / temperature, -1)
                logq_CB = torch.log_softmax(student_CV / temperature, -1)
                top1_C = teacher.argmax(-1)
            p_CB = logp_CB.exp()
            gap_CB = torch.where(p_CB == 0, 0.0, logp_CB - logq_CB)
            parts[1] = (p_CB * gap_CB).sum(-1) * temperature**2
            total = total + (kd_weight_C * parts[1]).sum()
            if metrics:
                parts[2] = torch.special.entr(p_CB).sum(-1)
                parts[3] = (top1_C == student_CV.argmax(-1)).to(ce_C.dtype)
        (gradient_CV,) = torch.autograd.grad(total, student_CV)
    out_CV.copy_(gradient_CV)
    return torch.stack(parts).detach()


def _buckets(scaled_CV: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of teacher and student ``[C, K + 1]``, and the teacher's likeliest."""
    used_CK = kept.logprobs_CK > -torch.inf
    named_CV = torch.zeros_like(scaled_CV, dtype=torch.int32)
    named_CV.scatter_add_(1, torch.where(used_CK, kept.ids_CK, 0), used_CK.int())
    floor = torch.finfo(scaled_CV.dtype).min  # a tail of nothing keeps its gradient finite
    tail_CV = scaled_CV.masked_fill(named_CV > 0, floor)
    lse_C1 = scaled_CV.logsumexp(-1, keepdim=True)
    logq_CK = scaled_CV.gather(1, torch.where(used_CK, kept.ids_CK, 0))
    tail_C1 = tail_CV.logsumexp(-1, keepdim=True)
    logq_CB = torch.cat([logq_CK, tail_C1], -1) - lse_C1
    logp_CB = torch.cat([kept.logprobs_CK, kept.tail_C[:, None]], -1)
    top1_C = kept.ids_CK.gather(1, kept.logprobs_CK.argmax(-1, keepdim=True))[:, 0]
    return logp_CB, logq_CB, top1_C


def _check_floats(logits_CV: Tensor, others: list[Tensor]) -> None:
    for tensor in others:
        wanted = logits_CV.dtype if tensor.is_floating_point() else torch.int64
        if tensor.dtype != wanted:
            raise ValueError(f"{tensor.dtype} beside logits in {logits_CV.dtype}")


def _on_gpu(tensors: list[Tensor]) -> bool:
    """Whether the Triton kernels are due; raises unless all tensors can be read by them."""
    device = tensors[0].device
    if any(t.device != device or not t.is_contiguous() for t in tensors):
        raise ValueError("the tensors must be contiguous and on one device")
    if device.type == "cuda":
        if tensors[0].dtype != torch.float32:
            raise ValueError(f"logits in {tensors[0].dtype}; the kernels read float32")
        return True
    if device.type != "cpu":
        raise ValueError(f"no kernel for {device}")
    return False
