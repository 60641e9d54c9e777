"""Per-document sums of what a model and a baseline make of the same tokens.

Pure cross entropy, in nats: from final hidden states through the head in fp32, a chunk of
tokens at a time. No ``labels=`` and no ``output_router_logits`` of transformers' own
forward, whose loss adds the router's auxiliary term (0.9 in the shipped configs).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexus_cli.core.distill.projection import project
from nexus_cli.core.evaluate.windows import WindowBatch

# B windows   S positions   N scored tokens of a batch   C tokens of a chunk
# H hidden    V vocabulary  E routed experts             K chosen experts   D documents

LOGITS_IN_A_CHUNK = 2**25  # 128 MiB in fp32, whatever the vocabulary

COLUMNS = (
    "tokens",  # scored tokens
    "nll",
    "base_nll",
    "kl",  # KL(base || model)
    "top1",  # tokens where both put the same token first
    "routers",  # sum over tokens of the share of routed experts in common, mean over layers
    "value_tokens",  # the same for tool calls' argument values
    "value_nll",
    "base_value_nll",
)


@dataclass(frozen=True)
class Subject:
    """A model, and whether it runs with its shared experts.

    ``model`` follows NexusGptOssForCausalLM: ``model.model(...)`` gives hidden states,
    ``model.lm_head.weight`` is the head.
    """

    model: Any
    shared_experts: bool = True

    def run(self, batch: WindowBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Final hidden states ``[B, S, H]`` and router logits, ``[B*S, E]`` a layer."""
        out = self.model.model(
            input_ids=batch.input_ids_BS,
            position_ids=batch.position_ids_BS,
            use_cache=False,
            shared_experts=self.shared_experts,
            output_router_logits=True,
        )
        return out.last_hidden_state, out.router_logits

    @property
    def head(self) -> Tensor:
        """The output embedding ``[V, H]``."""
        weight: Tensor = self.model.lm_head.weight
        return weight


@torch.no_grad()
def score(
    model: Subject,
    baseline: Subject,
    data: Iterable[WindowBatch],
    *,
    num_documents: int,
    top_k: int,
    device: torch.device | str,
) -> Tensor:
    """Sum :data:`COLUMNS` over the scored tokens of each document.

    Args:
        model: What is judged.
        baseline: What it is compared with, on the same tokens.
        data: Windows of the documents.
        num_documents: ``D``.
        top_k: Experts that a router chooses.
        device: Where both models are.

    Returns:
        float64 ``[D, len(COLUMNS)]`` on ``device``; sums of ranks may be added.
    """
    sums_DX = torch.zeros(num_documents, len(COLUMNS), dtype=torch.float64, device=device)
    for batch in data:
        _add_batch(sums_DX, model, baseline, batch.to(device), top_k)
    return sums_DX


def _add_batch(
    sums_DX: Tensor, model: Subject, baseline: Subject, batch: WindowBatch, top_k: int
) -> None:
    hidden_BSH, router_logits = model.run(batch)
    base_BSH, base_router_logits = baseline.run(batch)
    scored_BS = batch.scored_BS
    where_N = scored_BS.flatten().nonzero().squeeze(1)
    target_N = batch.target_BS[scored_BS]
    value_N = batch.value_BS[scored_BS].double()
    document_N = batch.document_B.unsqueeze(1).expand_as(scored_BS)[scored_BS]
    nll_N, base_nll_N, kl_N, top1_N = compare_heads(
        hidden_BSH[scored_BS], model.head, base_BSH[scored_BS], baseline.head, target_N
    )
    routers_N = router_overlap(router_logits, base_router_logits, where_N, top_k)
    columns = (
        torch.ones_like(nll_N),
        nll_N,
        base_nll_N,
        kl_N,
        top1_N,
        routers_N,
        value_N,
        value_N * nll_N,
        value_N * base_nll_N,
    )
    sums_DX.index_add_(0, document_N, torch.stack(columns, dim=1))


def compare_heads(
    hidden_NH: Tensor, head_VH: Tensor, base_NH: Tensor, base_head_VH: Tensor, target_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both models' loss on each token, and how far apart they are.

    Logits exist for a chunk of tokens at a time: at most :data:`LOGITS_IN_A_CHUNK` numbers.

    Args:
        hidden_NH: Final hidden states of the model.
        head_VH: Its head.
        base_NH: Final hidden states of the baseline at the same positions.
        base_head_VH: The baseline's head, with the same vocabulary.
        target_N: int64, the tokens that follow.

    Returns:
        Four float64 ``[N]``: the model's negative log-likelihood, the baseline's,
        KL(baseline || model) in nats, and 1 where both have the same most likely token.

    Raises:
        ValueError: If the vocabularies differ.
    """
    if len(head_VH) != len(base_head_VH):
        raise ValueError(
            f"the vocabularies differ: {len(head_VH)} tokens and {len(base_head_VH)} tokens"
        )
    out_4N = torch.zeros(4, len(target_N), dtype=torch.float64, device=hidden_NH.device)
    chunk = max(1, LOGITS_IN_A_CHUNK // len(head_VH))
    for begin in range(0, len(target_N), chunk):
        at = slice(begin, begin + chunk)
        logprobs_CV = log_probabilities(hidden_NH[at], head_VH)
        base_CV = log_probabilities(base_NH[at], base_head_VH)
        target_C1 = target_N[at].unsqueeze(1)
        out_4N[0, at] = -logprobs_CV.gather(1, target_C1).squeeze(1).double()
        out_4N[1, at] = -base_CV.gather(1, target_C1).squeeze(1).double()
        out_4N[3, at] = (logprobs_CV.argmax(1) == base_CV.argmax(1)).double()
        out_4N[2, at] = kl_divergence(base_CV, logprobs_CV).double()
    return out_4N[0], out_4N[1], out_4N[2], out_4N[3]


def kl_divergence(base_CV: Tensor, logprobs_CV: Tensor) -> Tensor:
    """``[C]``: KL(base || model) in nats, exact for small ones too, and never negative.

    ``sum p_b (d + exp(-d) - 1)`` with ``d = ln p_b - ln p_m`` is ``sum p_b d``, since both
    distributions sum to one; but a rounding error of a log-sum-exp, which moves every ``d``,
    only enters squared.

    Args:
        base_CV: Log-probabilities of the baseline.
        logprobs_CV: Log-probabilities of the model.
    """
    d_CV = base_CV - logprobs_CV
    base_CV = base_CV.exp()
    terms_CV = torch.expm1(-d_CV).add_(d_CV).mul_(base_CV)
    # Where exp(-d) overflows, p_b exp(-d) is p_m.
    far_CV = logprobs_CV.exp().add_(base_CV * (d_CV - 1))
    return torch.where(d_CV < -60, far_CV, terms_CV).sum(1)


def log_probabilities(hidden_CH: Tensor, head_VH: Tensor) -> Tensor:
    """``[C, V]``: log-softmax of logits that were never rounded to half precision.

    float32, or float64 for a float64 head.
    """
    logits_CV = project(hidden_CH, head_VH)
    return logits_CV.sub_(logits_CV.logsumexp(1, keepdim=True))


def router_overlap(
    logits: tuple[Tensor, ...], base_logits: tuple[Tensor, ...], where_N: Tensor, top_k: int
) -> Tensor:
    """float64 ``[N]``: share of a token's chosen experts that both routers chose, mean of layers.

    Args:
        logits: Router logits ``[B*S, E]`` of each layer.
        base_logits: The same of the baseline.
        where_N: int64, the flat positions to look at.
        top_k: Experts that a router chooses.
    """
    shared_N = torch.zeros(len(where_N), dtype=torch.float64, device=where_N.device)
    for one, other in zip(logits, base_logits, strict=True):
        chosen_NK = one[where_N].topk(top_k, dim=1).indices
        base_NK = other[where_N].topk(top_k, dim=1).indices
        shared_N += (chosen_NK.unsqueeze(2) == base_NK.unsqueeze(1)).sum((1, 2)).double()
    return shared_N / (top_k * len(logits))
