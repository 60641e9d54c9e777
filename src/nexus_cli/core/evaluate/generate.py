"""Generate an answer token by token."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from nexus_cli.core.evaluate.perplexity import Subject

# S tokens of the prompt   H hidden   V vocabulary


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: Share of the probability that is sampled from, most likely tokens first.
        max_tokens: Tokens of an answer at most.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512


def generate(
    subject: Subject,
    prompt_S: Tensor,
    stop: Collection[int],
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[int]:
    """Yield the tokens of an answer, the stop token too.

    Args:
        subject: The model.
        prompt_S: int64 tokens on the model's device.
        stop: Tokens that end an answer.
        sampling: How the next token is chosen.
        generator: On the CPU; the only source of chance.
    """
    cache = DynamicCache(config=subject.model.config)
    ids_1S, seen = prompt_S.unsqueeze(0), 0
    for _ in range(sampling.max_tokens):
        token = next_token(_logits(subject, ids_1S, seen, cache), sampling, generator)
        yield token
        if token in stop:
            return
        seen += ids_1S.shape[1]
        ids_1S = torch.tensor([[token]], device=prompt_S.device)


@torch.no_grad()
def _logits(subject: Subject, ids_1S: Tensor, seen: int, cache: DynamicCache) -> Tensor:
    """float32 ``[V]``: logits of the token after ``ids_1S``, which follows ``seen`` others."""
    positions_S = torch.arange(seen, seen + ids_1S.shape[1], device=ids_1S.device)
    out = subject.model.model(
        input_ids=ids_1S,
        position_ids=positions_S.unsqueeze(0),
        past_key_values=cache,
        use_cache=True,
        shared_experts=subject.shared_experts,
    )
    logits_V: Tensor = subject.head @ out.last_hidden_state[0, -1]
    return logits_V.float()


def next_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token: greedily at temperature 0, else from the nucleus.

    The nucleus is the smallest set of most likely tokens that holds ``top_p`` of the
    probability (Holtzman et al. 2020).
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V.cpu() / sampling.temperature, dim=0)
    sorted_V, order_V = probabilities_V.sort(descending=True)
    outside_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p
    kept_V = sorted_V.masked_fill(outside_V, 0.0)
    return int(order_V[torch.multinomial(kept_V, 1, generator=generator)])
