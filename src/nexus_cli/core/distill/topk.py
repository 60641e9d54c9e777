"""What a teacher store keeps of a distribution: the likeliest tokens, the rest, the nll."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nexus_cli.core.distill.projection import project
from nexus_cli.core.distill.teacher import TAIL_TEMPERATURES
from nexus_cli.core.kernels.head_top_k import top_k_of_logits

# Shape letters in this file: N positions, C positions of one chunk, H hidden size, V vocabulary,
# K kept entries, T temperatures of the tails, m samples of the tail, B blocks of the vocabulary,
# W logits of a block.

_BLOCK = 512  # near the square root of a vocabulary: a sample draws over B blocks, then over W


@dataclass(frozen=True)
class TopK:
    """The teacher at N positions, at temperature 1, in nats and float32.

    Attributes:
        ids_NK: the K likeliest tokens, likeliest first ``[N, K]``, int64.
        logprobs_NK: their exact log-probabilities over the whole vocabulary ``[N, K]``; ``-inf``
            marks an entry that is not used, and belongs to the tail.
        tails_NT: ``log sum p ** (1 / T)`` over all tokens that are not kept, one column for each
            of ``TAIL_TEMPERATURES`` ``[N, 3]``: the first is the log of their mass. ``-inf`` if
            none is left.
        nll_N: negative log-probability of the label ``[N]``.
        tail_samples_Nm: tokens that are not kept, drawn with replacement in proportion to their
            probabilities ``[N, m]``, int64, -1 if none is left; ``None`` if not asked for.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tails_NT: Tensor
    nll_N: Tensor
    tail_samples_Nm: Tensor | None = None


@torch.no_grad()
def top_k(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    k: int,
    *,
    chunk_size: int = 2048,
    top_p: float = 1.0,
    min_k: int = 1,
    num_tail_samples: int = 0,
    generator: torch.Generator | None = None,
) -> TopK:
    """Take the likeliest tokens of every position without holding ``[N, V]`` logits.

    On a GPU the logits of a chunk are read once by kernels, for K up to 64; see
    :func:`~nexus_cli.core.kernels.head_top_k.top_k_of_logits`. Samples of the tail read them
    a few times more.

    Args:
        hidden_NH: final hidden states ``[N, H]``, any float dtype.
        head_VH: the head ``[V, H]``; logits are accumulated in float32.
        labels_N: the token that follows each position ``[N]``, any valid id where none does.
        k: entries a position, at most V.
        chunk_size: positions whose logits exist at once. Samples depend on it.
        top_p: see :func:`nucleus`.
        min_k: likewise.
        num_tail_samples: tokens drawn from what is not kept in the end.
        generator: of the samples, on the device of the hidden states; ``None`` for its default.

    Raises:
        ValueError: if ``k`` exceeds the vocabulary, or ``top_p``, ``min_k`` or
            ``num_tail_samples`` is out of range.
    """
    if not 1 <= k <= len(head_VH):
        raise ValueError(f"cannot keep {k} of {len(head_VH)} tokens")
    if num_tail_samples < 0:
        raise ValueError(f"cannot draw {num_tail_samples} samples")
    labels_N = labels_N.contiguous()
    rows = min(chunk_size, len(hidden_NH))
    dtype = torch.float64 if head_VH.dtype == torch.float64 else torch.float32
    buffer_CV = hidden_NH.new_empty(rows, len(head_VH), dtype=dtype)
    chunks = []
    for start in range(0, max(len(hidden_NH), 1), chunk_size):  # no position is a chunk of none
        hidden_CH = hidden_NH[start : start + chunk_size]
        logits_CV = project(hidden_CH, head_VH, buffer_CV[: len(hidden_CH)]).float()
        found = TopK(*top_k_of_logits(logits_CV, labels_N[start : start + chunk_size], k))
        kept = nucleus(found, top_p, min_k)
        if num_tail_samples:
            used_CK = kept.logprobs_NK > -torch.inf
            ids_CK = torch.where(used_CK, kept.ids_NK, kept.ids_NK[:, :1])  # the first is used
            samples_Cm = tail_samples(logits_CV, ids_CK, num_tail_samples, generator)
            kept = replace(kept, tail_samples_Nm=samples_Cm)
        chunks.append(kept)
    return _joined(chunks)


def nucleus(kept: TopK, top_p: float, min_k: int) -> TopK:
    """Leave the fewest likeliest entries whose mass reaches ``top_p``, and at least ``min_k``.

    The entry with which the mass reaches ``top_p`` is kept. An entry after it gets the
    log-probability ``-inf`` and its mass goes to the tails. The device is not waited for.

    Args:
        kept: entries likeliest first, on any device, without samples: they depend on what is
            kept.
        top_p: in (0, 1]; 1 keeps every entry, as a mass in floating point may reach 1 too early.
        min_k: 1 to K.

    Raises:
        ValueError: an argument is out of range, or there are samples.
    """
    num_entries = kept.ids_NK.shape[1]
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p lies above 0 and not above 1; it is {top_p:g}")
    if not 1 <= min_k <= num_entries:
        raise ValueError(f"cannot keep at least {min_k} of {num_entries} entries")
    if kept.tail_samples_Nm is not None:
        raise ValueError("the samples were drawn from a smaller tail")
    if top_p == 1:
        return kept
    mass_NK = kept.logprobs_NK.double().exp().cumsum(-1)
    before_NK = torch.nn.functional.pad(mass_NK[:, :-1], (1, 0))
    place_K = torch.arange(num_entries, device=mass_NK.device)
    left_NK = (before_NK < top_p) | (place_K < min_k)
    moved_NK = kept.logprobs_NK.masked_fill(left_NK, -torch.inf)
    moved = [(moved_NK / temperature).logsumexp(-1) for temperature in TAIL_TEMPERATURES]
    return replace(
        kept,
        logprobs_NK=kept.logprobs_NK.masked_fill(~left_NK, -torch.inf),
        tails_NT=torch.logaddexp(kept.tails_NT, torch.stack(moved, dim=-1)),
    )


@torch.no_grad()
def tail_samples(
    logits_CV: Tensor, ids_CK: Tensor, m: int, generator: torch.Generator | None
) -> Tensor:
    """Draw tokens outside ``ids_CK`` in proportion to their probabilities, with replacement.

    A block is drawn, then a token of it, each as the first to arrive in a race: the arrival times
    are exponential with the weights as rates. A weight of zero never arrives, which a search in
    rounded cumulative sums would not promise. The device is not waited for. Beyond the logits it
    takes about 12 KiB a draw.

    Args:
        logits_CV: float32 or float64. Destroyed.
        ids_CK: int64, the tokens left out; repeats do no harm.
        m: draws a position.
        generator: on the device of the logits; ``None`` for its default.

    Returns:
        Ids ``[C, m]``, int64; -1 where every token is left out.
    """
    num_tokens = logits_CV.shape[1]
    left_CV = logits_CV.scatter_(1, ids_CK, -torch.inf)
    top_C1 = left_CV.amax(-1, keepdim=True).clamp_min(torch.finfo(left_CV.dtype).min)
    weight_CV = left_CV.sub_(top_C1).exp_()
    num_whole = num_tokens // _BLOCK
    whole_CV, last_CV = weight_CV.tensor_split([num_whole * _BLOCK], dim=1)
    whole_CB = whole_CV.view(len(whole_CV), num_whole, _BLOCK).sum(-1)
    sums_CB = torch.cat([whole_CB, last_CV.sum(-1, keepdim=True)], dim=1)
    block_Cm = _first_to_arrive(sums_CB[:, None].expand(-1, m, -1), generator)
    column_CmW = block_Cm[..., None] * _BLOCK + torch.arange(_BLOCK, device=weight_CV.device)
    inside_CmW = column_CmW < num_tokens
    column_CX = column_CmW.clamp_max_(num_tokens - 1).flatten(1)
    weight_CmW = weight_CV.gather(1, column_CX).view(inside_CmW.shape) * inside_CmW
    token_Cm = block_Cm * _BLOCK + _first_to_arrive(weight_CmW, generator)
    return torch.where(sums_CB.sum(-1, keepdim=True) > 0, token_Cm, -1)


def _first_to_arrive(rates: Tensor, generator: torch.Generator | None) -> Tensor:
    """Index of one entry of the last dimension, with chances in proportion to the rates."""
    times = torch.empty_like(rates, memory_format=torch.contiguous_format)
    # Never zero: a rate of zero over it would not be a number, and win.
    times.exponential_(generator=generator).clamp_min_(torch.finfo(times.dtype).tiny)
    return (rates / times).argmax(-1)


def _joined(chunks: list[TopK]) -> TopK:
    samples = [kept.tail_samples_Nm for kept in chunks if kept.tail_samples_Nm is not None]
    return TopK(
        ids_NK=torch.cat([kept.ids_NK for kept in chunks]),
        logprobs_NK=torch.cat([kept.logprobs_NK for kept in chunks]),
        tails_NT=torch.cat([kept.tails_NT for kept in chunks]),
        nll_N=torch.cat([kept.nll_N for kept in chunks]),
        tail_samples_Nm=torch.cat(samples) if samples else None,
    )
