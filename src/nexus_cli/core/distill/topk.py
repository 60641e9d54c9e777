"""What a teacher store keeps of a distribution: the K likeliest tokens, the rest, the nll."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_cli.core.distill.projection import project

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
    hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, k: int, *, chunk_size: int = 1024
) -> TopK:
    """Take the top K of every position without holding ``[N, V]`` logits.

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
    chunks = [
        _chunk(
            hidden_NH[start : start + chunk_size], head_VH, labels_N[start : start + chunk_size], k
        )
        for start in range(0, len(hidden_NH), chunk_size)
    ]
    return TopK(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _chunk(hidden_CH: Tensor, head_VH: Tensor, labels_C: Tensor, k: int) -> tuple[Tensor, ...]:
    logp_CV = torch.log_softmax(project(hidden_CH, head_VH).float(), dim=-1)
    nll_C = -logp_CV.gather(1, labels_C[:, None])[:, 0]
    logprobs_CK, ids_CK = logp_CV.topk(k, dim=-1)
    # Summed over the tail itself: 1 - sum of the kept would lose a small tail to cancellation.
    tail_C = logp_CV.exp_().scatter_(1, ids_CK, 0.0).sum(-1).log()
    return ids_CK, logprobs_CK, tail_C, nll_C
