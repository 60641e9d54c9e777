"""Logits over the full 201,088-token vocabulary that are as sharp as those of a real model.

The recipe, for one position; ``w`` is the Zipf law ``w(id) ~ 1 / (id + 1)``:

1.  Ids. GPT-OSS's tokenizer (o200k) numbers its BPE merges roughly by frequency, so an id is taken
    as its rank. ``score(id) = ln w(id) + Gumbel noise``: sorted by score, the ids are successive
    draws without replacement from the Zipf law. It is so for the head, and down to the last id.
2.  Logits. ``u = score - max score <= 0`` falls like ``-ln rank``, with noise. The logit is
    ``s u - c u^2``: probabilities decay as the power ``s`` of the rank, faster further down.
    ``s = SLOPE exp(SLOPE_SPREAD g)`` differs by position; ``c = CURVATURE``. The tail thus follows
    the Zipf law times noise, both to a power that grows from ``s``.
3.  Certainty. The first id's logit is raised by ``max(0, LEAD g)``: half of the positions are left
    flat, many of the others are nearly certain.
4.  Level. ``LEVEL + LEVEL_SPREAD g`` is added to all: raw logits are not normalised.

Every ``g`` is a standard normal number of its own, and those of a chunk are spread evenly. The
constants were chosen so that 4,096 positions have a mean entropy of 2.05 +- 0.1 nats and a mean K
of 20 to 22, where ``K`` is the smallest number of ids with a cumulative probability of ``TOP_P``,
clipped to ``K_MIN .. K_MAX``. A small real model measured so on text (perplexity 7.8).
:meth:`Census.check` asserts it; at 1,024 positions a mean still moves by 0.05 nats with the seed.

A student is the teacher with independent Gaussian noise on every logit: a near one, at a mean
KL(teacher || student) of 0.066 nats, as one that starts from its teacher. A far one is moreover
mixed with the Zipf law, in log-probability: it knows how frequent tokens are and little else. Its
mean KL is 1.7 nats.
"""

# ruff: noqa: N803, N806, N815 - the names of arrays end with their shapes

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Shape letters in this file: C positions of a chunk, V vocabulary, K ranks.

VOCAB_SIZE, CHUNK = 201_088, 256
SLOPE, SLOPE_SPREAD, CURVATURE = 1.22, 0.25, 0.018
LEAD, LEVEL, LEVEL_SPREAD = 6.0, 20.0, 3.0
NEAR_NOISE, FAR_MIX = 0.52, 0.525
TOP_P, K_MIN, K_MAX = 0.98, 4, 32
ENTROPY_NATS, MEAN_K = (1.95, 2.15), (20.0, 22.0)
NEAR_KL, FAR_KL = (0.060, 0.072), (1.6, 1.8)


@dataclass(frozen=True)
class Chunk:
    """Some consecutive positions.

    Attributes:
        number: which chunk of its generator this is.
        logits_CV: the teacher's raw logits, float32.
        labels_C: a next token drawn from each position's distribution, int64.
    """

    number: int
    logits_CV: Tensor
    labels_C: Tensor


def synthetic_logits(
    num_positions: int, vocab_size: int = VOCAB_SIZE, seed: int = 0, chunk: int = CHUNK
) -> Iterator[Chunk]:
    """Yield ``num_positions`` in chunks of at most ``chunk``: 0.8 MB a position at 201,088 ids.

    The same arguments give the same numbers; another ``chunk`` gives others.
    """
    zipf_V = zipf_logprobs(vocab_size)
    for number, start in enumerate(range(0, num_positions, chunk)):
        generator = _generator(seed, number, stream=0)
        logits_CV = _logits(zipf_V, min(chunk, num_positions - start), generator)
        yield Chunk(number, logits_CV, draw(torch.softmax(logits_CV, -1), 1, generator)[:, 0])


def zipf_logprobs(vocab_size: int = VOCAB_SIZE) -> Tensor:
    """Natural logarithm of the Zipf law over ids, float32 ``[V]``."""
    rank_V = torch.arange(1, vocab_size + 1, dtype=torch.float64)
    return torch.log_softmax(-rank_V.log(), 0).float()


def student_logits(chunk: Chunk, *, far: bool = False, seed: int = 0) -> Tensor:
    """A student's logits at a chunk of the teacher's, float32 ``[C, V]``.

    Args:
        chunk: the teacher's positions.
        far: mix with the Zipf law.
        seed: of the noise, which does not depend on the teacher's.
    """
    noise_CV = torch.empty_like(chunk.logits_CV)
    noise_CV.normal_(0, NEAR_NOISE, generator=_generator(seed, chunk.number, stream=1))
    if not far:
        return noise_CV.add_(chunk.logits_CV)
    noise_CV.add_(torch.log_softmax(chunk.logits_CV, -1), alpha=1 - FAR_MIX)
    return noise_CV.add_(zipf_logprobs(noise_CV.shape[1]), alpha=FAR_MIX)


def draw(weights_CV: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ids in proportion to ``weights_CV``, with replacement, int64 ``[C, count]``."""
    sums_CV = weights_CV.cumsum(-1)
    point_CN = torch.rand(len(sums_CV), count, generator=generator) * sums_CV[:, -1:]
    # right: a point on a boundary must not fall on an id of no weight
    return torch.searchsorted(sums_CV, point_CN, right=True).clamp_max_(sums_CV.shape[1] - 1)


@dataclass
class Census:
    """What positions look like, summed over chunks of any teacher's logits."""

    positions: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(
        self, logits_CV: Tensor, labels_C: Tensor, student_logits_CV: Tensor | None = None
    ) -> None:
        """Count the positions of one chunk; with a student, its distance too."""
        logp_CV = torch.log_softmax(logits_CV, -1)
        p_CV = logp_CV.exp()
        kept_C, top_CK = kept(p_CV)
        found = {
            "entropy_nats": -(p_CV * logp_CV).sum(-1),
            "nll_nats": -logp_CV.gather(1, labels_C[:, None])[:, 0],
            "k": kept_C,
            "share_k_min": kept_C == K_MIN,
            "share_k_max": kept_C == K_MAX,
            "top1": top_CK[:, 0],
            "tail_after_k_max": (1 - top_CK.sum(-1)).clamp_min(0),
        }
        if student_logits_CV is not None:
            logq_CV = torch.log_softmax(student_logits_CV, -1)
            found["kl_nats"] = (p_CV * logp_CV.sub_(logq_CV)).sum(-1)
        self.positions += len(logits_CV)
        for name, value_C in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value_C.double().sum())

    def means(self) -> dict[str, float]:
        """Of every measure over the positions; nats and shares."""
        return {name: total / self.positions for name, total in self.sums.items()}

    def check(self, *, far: bool = False) -> None:
        """Refuse positions that do not meet the recipe.

        Raises:
            ValueError: a mean is outside its range.
        """
        means = self.means()
        ranges = {"entropy_nats": ENTROPY_NATS, "k": MEAN_K, "kl_nats": FAR_KL if far else NEAR_KL}
        for name, (low, high) in ranges.items():
            if name in means and not low <= means[name] <= high:
                raise ValueError(f"mean {name} is {means[name]:.3f}, not within {low} to {high}")


def kept(p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """How many ids the rule keeps ``[C]``, int64, and the likeliest ``K_MAX`` probabilities."""
    top_CK = p_CV.topk(min(K_MAX, p_CV.shape[1])).values
    return ((top_CK.cumsum(-1) < TOP_P).sum(-1) + 1).clamp(K_MIN, K_MAX), top_CK


def describe(chunks: Iterable[Chunk]) -> dict[str, float]:
    """Means over the chunks of one teacher, which this consumes."""
    census = Census()
    for chunk in chunks:
        census.add(chunk.logits_CV, chunk.labels_C)
    return census.means()


def _logits(zipf_V: Tensor, num_positions: int, generator: torch.Generator) -> Tensor:
    """Raw logits of the recipe, float32 ``[num_positions, V]``."""
    slope_C, lead_C, level_C = (_normal(num_positions, generator) for _ in range(3))
    slope_C = SLOPE * torch.exp(SLOPE_SPREAD * slope_C)
    u_CV = torch.empty(num_positions, len(zipf_V)).exponential_(generator=generator)
    u_CV.log_().neg_().add_(zipf_V)
    best_C1 = u_CV.max(-1, keepdim=True)
    u_CV -= best_C1.values
    factor_CV = (u_CV * -CURVATURE).add_(slope_C[:, None])
    logits_CV = u_CV.mul_(factor_CV)
    logits_CV.scatter_add_(1, best_C1.indices, (LEAD * lead_C[:, None]).clamp_min(0))
    return logits_CV.add_((LEVEL + LEVEL_SPREAD * level_C)[:, None])


def _normal(count: int, generator: torch.Generator) -> Tensor:
    """The middles of ``count`` equally likely parts of the standard normal, in random order.

    Drawn freely, means would move more from seed to seed.
    """
    share_C = (torch.randperm(count, generator=generator) + 0.5) / count
    normal_C: Tensor = torch.special.ndtri(share_C)
    return normal_C


def _generator(seed: int, number: int, stream: int) -> torch.Generator:
    """One for every chunk, so that each can be made again alone."""
    return torch.Generator().manual_seed((seed * 2 + stream) * 1_000_003 + number)
