"""What a teacher store keeps of a distribution: the K likeliest tokens, the rest, the nll."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_cli.core.distill.projection import project
from nexus_cli.core.kernels.head_top_k import top_k_of_logits

# Shape letters in this file: N positions, C positions of one chunk, H hidden size, V vocabulary,
# K kept entries.


@dataclass(frozen=True)
class TopK:
    """The teacher at N positions, at temperature 1, in nats and float32.

    Attributes:
        ids_NK: the K likeliest tokens, likeliest first ``[N, K]``, int64.
        logprobs_NK: their exact log-probabilities over the whole vocabulary ``[N, K]``.
        tail_logprob_N: log of the mass of all other tokens ``[N]``; ``-inf`` if K is V.
        nll_N: negative log-probability of the label ``[N]``.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logprob_N: Tensor
    nll_N: Tensor


@torch.no_grad()
def top_k(
    hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, k: int, *, chunk_size: int = 2048
) -> TopK:
    """Take the top K of every position without holding ``[N, V]`` logits.

    On a GPU the logits of a chunk are read once by kernels, for K up to 64; see
    :func:`~nexus_cli.core.kernels.head_top_k.top_k_of_logits`.

    Args:
        hidden_NH: final hidden states ``[N, H]``, any float dtype.
        head_VH: the head ``[V, H]``; logits are accumulated in float32.
        labels_N: the token that follows each position ``[N]``, any valid id where none does.
        k: entries kept, at most V.
        chunk_size: positions whose logits exist at once.

    Raises:
        ValueError: if ``k`` exceeds the vocabulary.
    """
    if not 1 <= k <= len(head_VH):
        raise ValueError(f"cannot keep {k} of {len(head_VH)} tokens")
    labels_N = labels_N.contiguous()
    rows = min(chunk_size, len(hidden_NH))
    dtype = torch.float64 if head_VH.dtype == torch.float64 else torch.float32
    buffer_CV = hidden_NH.new_empty(rows, len(head_VH), dtype=dtype)
    chunks = []
    for start in range(0, max(len(hidden_NH), 1), chunk_size):  # no position is a chunk of none
        hidden_CH = hidden_NH[start : start + chunk_size]
        logits_CV = project(hidden_CH, head_VH, buffer_CV[: len(hidden_CH)]).float()
        chunks.append(top_k_of_logits(logits_CV, labels_N[start : start + chunk_size], k))
    return TopK(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
