"""Hidden states times the frozen head, with float32 logits whatever the dtype of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

# Shape letters in this file: C positions of one chunk, H hidden size, V vocabulary.

_SLICE = 8192  # vocabulary rows upcast at once where the device cannot return float32 itself


def project(hidden_CH: Tensor, head_VH: Tensor, out_CV: Tensor | None = None) -> Tensor:
    """Logits of a chunk, accumulated and returned in float32 (float64 for a float64 head).

    Logits rounded to bf16 are off by up to 0.06 at a logit of 16: enough to tie the entries of a
    top-K and to hide a small divergence. So the product keeps the weights' dtype on the way in
    and float32 on the way out.

    Args:
        hidden_CH: ``[C, H]``, any float dtype; taken to the head's.
        head_VH: weight of the head ``[V, H]``, never copied whole.
        out_CV: a contiguous buffer of the result's dtype to write to; not where a graph is kept.

    Returns:
        ``[C, V]``, ``out_CV`` or a fresh tensor, that the caller may overwrite.
    """
    hidden_CH = hidden_CH.to(head_VH.dtype)
    if head_VH.dtype in (torch.float32, torch.float64):
        return torch.mm(hidden_CH, head_VH.T, out=out_CV)
    if hidden_CH.is_cuda and out_CV is None:
        return torch.mm(hidden_CH, head_VH.T, out_dtype=torch.float32)
    if hidden_CH.is_cuda:
        return torch.mm(hidden_CH, head_VH.T, out_dtype=torch.float32, out=out_CV)
    shape = (hidden_CH.shape[0], head_VH.shape[0])
    logits_CV = torch.empty(shape, device=hidden_CH.device) if out_CV is None else out_CV
    for start in range(0, head_VH.shape[0], _SLICE):
        rows = slice(start, start + _SLICE)
        logits_CV[:, rows] = hidden_CH.float() @ head_VH[rows].float().T
    return logits_CV
