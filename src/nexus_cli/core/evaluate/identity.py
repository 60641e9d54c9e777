"""The claim that the shared expert only adds: switched off, the model is the base, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nexus_cli.core.evaluate.perplexity import Subject, log_probabilities
from nexus_cli.core.evaluate.windows import WindowBatch

# B windows   S positions   H hidden   N = B*S   V vocabulary

GATE = ".mlp.shared_expert.output_gate"
ROUTER = ".mlp.router."


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences between two runs on the same tokens."""

    hidden: float
    logit: float


@torch.no_grad()
def hidden_states(
    subject: Subject, data: Iterable[WindowBatch], device: torch.device | str
) -> list[Tensor]:
    """Final hidden states ``[B, S, H]`` of each batch, on the CPU, in the model's dtype."""
    return [subject.run(batch.to(device))[0].cpu() for batch in data]


@torch.no_grad()
def difference(
    one: Iterable[Tensor], other: Iterable[Tensor], head_VH: Tensor, other_head_VH: Tensor
) -> Difference:
    """Compare two lists of hidden states, and the log-probabilities that they lead to.

    A number that is not finite makes the difference infinite: NaN equals nothing.

    Args:
        one: Hidden states as :func:`hidden_states` gives them.
        other: The same of the other run.
        head_VH: The head of the first.
        other_head_VH: The head of the other.
    """
    hidden, logit = 0.0, 0.0
    for a_BSH, b_BSH in zip(one, other, strict=True):
        a_NH, b_NH = a_BSH.flatten(0, 1), b_BSH.flatten(0, 1)
        hidden = max(hidden, _largest(a_NH.float() - b_NH.float()))
        last = slice(-1, None)  # one position a batch: the logits are large, the heads equal
        a_1V = log_probabilities(a_NH[last].to(head_VH.device), head_VH)
        b_1V = log_probabilities(b_NH[last].to(other_head_VH.device), other_head_VH)
        logit = max(logit, _largest(a_1V.cpu() - b_1V.cpu()))
    return Difference(hidden, logit)


@contextmanager
def gates_at_zero(model: nn.Module) -> Iterator[None]:
    """Hold every shared expert's gate at zero inside the block."""
    with _values({n: torch.zeros_like(p) for n, p in _named(model, GATE).items()}, model):
        yield


@contextmanager
def routers_of(model: nn.Module, base: nn.Module) -> Iterator[None]:
    """Give ``model`` the routers of ``base`` inside the block; a trained router is its own."""
    with _values(_named(base, ROUTER), model):
        yield


def same_routers(model: nn.Module, base: nn.Module) -> bool:
    """Whether training left the routers alone."""
    mine, theirs = _named(model, ROUTER), _named(base, ROUTER)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@contextmanager
def _values(values: dict[str, Tensor], model: nn.Module) -> Iterator[None]:
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in values}
    try:
        for name, value in values.items():
            parameters[name].data.copy_(value)
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data.copy_(value)


def _named(model: nn.Module, part: str) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if part in name}


def _largest(difference: Tensor) -> float:
    if not difference.numel():
        return 0.0
    return float(difference.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max())
