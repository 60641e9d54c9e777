"""The router's choice: the best K experts of each token, weighted by a softmax over those."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_cli.core.kernels.placement import on_gpu

# Shape letters in this file: T tokens, E experts, K experts a token.

MAX_EXPERTS = 256
MAX_TOP_K = 8


def top_k_softmax(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row in descending order, and the softmax over them.

    Among equal logits the lower expert comes first. The softmax is computed in float32.

    Args:
        logits_TE: contiguous; E at most 256.
        k: experts a token, at most 8.

    Returns:
        Scores ``[T, K]`` in the dtype of the logits, and experts ``[T, K]``, int32.

    Raises:
        ValueError: if E or k is out of range, or the logits are strided.
    """
    experts = logits_TE.shape[1]
    if not 1 <= k <= min(MAX_TOP_K, experts) or experts > MAX_EXPERTS:
        raise ValueError(f"top {k} of {experts} experts")
    if on_gpu(logits_TE):
        from nexus_cli.core.kernels.triton import router as kernels

        return kernels.top_k_softmax(logits_TE, k)
    return top_k_softmax_torch(logits_TE, k)


def top_k_softmax_torch(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`top_k_softmax` in PyTorch, on any device."""
    best_TE, experts_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True)
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    scores_TK = torch.softmax(best_TE[:, :k].to(dtype), dim=-1)
    return scores_TK.to(logits_TE.dtype), experts_TE[:, :k].int().contiguous()


def top_k_softmax_backward(
    grad_scores_TK: Tensor, scores_TK: Tensor, experts_TK: Tensor, num_experts: int
) -> Tensor:
    """Gradient to the logits ``[T, E]`` of :func:`top_k_softmax`; zero where not chosen.

    Args:
        grad_scores_TK: any float dtype, contiguous.
        scores_TK: as the forward pass returned them.
        experts_TK: likewise.
        num_experts: E, at most 256.

    Returns:
        The gradient in the dtype of the scores.

    Raises:
        ValueError: if shapes, devices or strides do not fit.
    """
    if not grad_scores_TK.shape == scores_TK.shape == experts_TK.shape:
        raise ValueError("gradient, scores and experts differ in shape")
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"{num_experts} experts; the kernel holds {MAX_EXPERTS}")
    if on_gpu(scores_TK, grad_scores_TK, experts_TK):
        from nexus_cli.core.kernels.triton import router as kernels

        return kernels.top_k_softmax_backward(grad_scores_TK, scores_TK, experts_TK, num_experts)
    return top_k_softmax_backward_torch(grad_scores_TK, scores_TK, experts_TK, num_experts)


def top_k_softmax_backward_torch(
    grad_scores_TK: Tensor, scores_TK: Tensor, experts_TK: Tensor, num_experts: int
) -> Tensor:
    """:func:`top_k_softmax_backward` in PyTorch, on any device."""
    dtype = torch.promote_types(scores_TK.dtype, torch.float32)
    grad_TK, wide_TK = grad_scores_TK.to(dtype), scores_TK.to(dtype)
    grad_TK = wide_TK * (grad_TK - (wide_TK * grad_TK).sum(-1, keepdim=True))
    grad_TE = grad_TK.new_zeros(len(scores_TK), num_experts)
    return grad_TE.scatter_(1, experts_TK.long(), grad_TK).to(scores_TK.dtype)
