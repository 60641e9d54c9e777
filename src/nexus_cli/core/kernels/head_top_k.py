"""The K likeliest entries of a chunk of logits, the rest in three sums, and the label's nll."""

from __future__ import annotations

import torch
from torch import Tensor

# Shape letters in this file: C positions of a chunk, V vocabulary, K kept entries, T temperatures.

# Each twice the one before: an exponential at the last, squared, is the one at the temperature
# before it. So the tail's sums at all of them cost one exponential a logit.
TAIL_TEMPERATURES = (1, 2, 4)
MAX_TOP_K = 64
MAX_VOCABULARY = 524_288


def top_k_of_logits(
    logits_CV: Tensor, labels_C: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact top K, log-probabilities over the whole vocabulary, tails and nll.

    On a GPU the logits are read once. Of equal logits the lower id comes first there; the PyTorch
    form leaves their order open. K over 64 or V over 524,288 goes to the PyTorch form on any
    device: the kernels hold one row's blocks and candidates in registers.

    Args:
        logits_CV: float32 (on a CPU any float dtype), contiguous.
        labels_C: int64. One outside the vocabulary gives a nll of NaN in the kernels.
        k: entries kept, 1 to V.

    Returns:
        Ids ``[C, K]`` (int64, likeliest first), their log-probabilities ``[C, K]``, the tails
        ``[C, T]``, and the label's negative log-probability ``[C]``; nats, in the dtype of the
        logits. Column t of the tails is ``log sum p ** (1 / T_t)`` over all others, with p at
        temperature 1: the first is the log of their mass. They are summed over themselves;
        ``-inf`` if there are none.

    Raises:
        ValueError: if k is out of range, or devices, dtypes or strides do not fit.
    """
    vocabulary = logits_CV.shape[1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"cannot keep {k} of {vocabulary} tokens")
    if labels_C.device != logits_CV.device or labels_C.dtype != torch.int64:
        raise ValueError("the labels must be int64 and on the device of the logits")
    if logits_CV.device.type not in ("cuda", "cpu"):
        raise ValueError(f"no kernel for {logits_CV.device}")
    if logits_CV.is_cuda and k <= MAX_TOP_K and vocabulary <= MAX_VOCABULARY:
        if logits_CV.dtype != torch.float32:
            raise ValueError(f"logits in {logits_CV.dtype}; the kernels read float32")
        if not (logits_CV.is_contiguous() and labels_C.is_contiguous()):
            raise ValueError("the tensors must be contiguous")
        from nexus_cli.core.kernels.triton import head_top_k as kernels

        return kernels.top_k_of_logits(logits_CV, labels_C, k)
    return top_k_of_logits_torch(logits_CV, labels_C, k)


def top_k_of_logits_torch(
    logits_CV: Tensor, labels_C: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`top_k_of_logits` in PyTorch, on any device."""
    logp_CV = torch.log_softmax(logits_CV, dim=-1)
    nll_C = -logp_CV.gather(1, labels_C[:, None])[:, 0]
    # Chosen by the logits: subtracting the log-sum-exp rounds neighbours to equal values.
    ids_CK = logits_CV.topk(k, dim=-1).indices
    logprobs_CK = logp_CV.gather(1, ids_CK)
    # Summed over the tail itself: 1 - sum of the kept would lose a small tail to cancellation.
    return ids_CK, logprobs_CK, _power_sums(logp_CV.scatter_(1, ids_CK, -torch.inf)), nll_C


def _power_sums(logp_CV: Tensor) -> Tensor:
    """``log sum exp(logp / T)`` at each temperature ``[C, T]``; ``logp_CV`` is overwritten."""
    # Finite where a row has nothing left: -inf minus itself is not a number.
    top_C1 = logp_CV.amax(-1, keepdim=True).clamp_min(torch.finfo(logp_CV.dtype).min)
    power_CV = logp_CV.sub_(top_C1).div_(TAIL_TEMPERATURES[-1]).exp_()
    sums = [power_CV.sum(-1)]
    for _ in TAIL_TEMPERATURES[1:]:
        sums.append(power_CV.square_().sum(-1))
    tops = [top_C1 / temperature for temperature in TAIL_TEMPERATURES]
    return torch.stack(sums[::-1], dim=-1).log_() + torch.cat(tops, dim=-1)
