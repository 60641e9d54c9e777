"""Checks that need no text: the files, the numbers in them, and the switched-off model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from nexus_cli.core.evaluate.identity import (
    Difference,
    difference,
    gates_at_zero,
    hidden_states,
    routers_of,
)
from nexus_cli.core.evaluate.perplexity import Subject
from nexus_cli.core.evaluate.windows import WindowBatch
from nexus_cli.core.model.gpt_oss.surgery import trainable_names
from nexus_cli.io import model_dir
from nexus_cli.pipeline.validate_models import Changes, Choice

PROBES, PROBE_TOKENS = 4, 160  # past the sliding window of every member of the family

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    check: str
    value: float | int
    threshold: float | int
    passed: bool


def structure(choice: Choice, found: Changes | None) -> list[Check]:
    """Checks of the files."""
    shape = model_dir.read_shape(choice.model.path)
    if not shape.num_shared_experts:
        log.warning("%s has no shared expert: it is compared as it is", choice.model.path)
    if found is None:
        log.warning("the base is not known: whether its tensors are unchanged was not checked")
        return []
    count = len(found.frozen)
    if count:
        log.warning("frozen tensors that differ from the base's, such as %s", found.frozen[0])
    if found.routers:
        log.info("the router was trained: %d tensors differ", len(found.routers))
    return [Check("frozen tensors that differ from the base", count, 0, count == 0)]


@torch.no_grad()
def switched_off(
    model: Any, base: Any | None, found: Changes | None, *, seed: int, device: torch.device
) -> list[Check]:
    """The forward pass is finite, and with the shared experts off it is the base's.

    Random tokens reach all experts, which a few sentences would not. Without a base at hand
    the same is asked of gates at zero: ``y + 0 S(x)`` must be ``y``, bit for bit.

    Args:
        model: What is judged.
        base: Its base, loaded in the same way, or ``None``.
        found: How their files differ; a trained router is lent the base's for this check.
        seed: Seed of the tokens.
        device: Where the models are.
    """
    probes = _probes(model.config.vocab_size, seed)
    with_experts = hidden_states(Subject(model), probes, device)
    trained = [p for n, p in model.named_parameters() if n in set(_trainable(model))]
    broken = sum(int((~torch.isfinite(values)).sum()) for values in (*trained, *with_experts))
    checks = [Check("trained weights and outputs that are not finite", broken, 0, broken == 0)]
    if base is None:
        off = hidden_states(Subject(model, shared_experts=False), probes, device)
        with gates_at_zero(model):
            closed = hidden_states(Subject(model), probes, device)
        gap = difference(off, closed, model.lm_head.weight, model.lm_head.weight)
        return [*checks, *_equal("gate at zero equals gate off", gap)]
    reference = hidden_states(Subject(base), probes, device)
    if found is not None and found.routers:
        with routers_of(model, base):
            off = hidden_states(Subject(model, shared_experts=False), probes, device)
    else:
        off = hidden_states(Subject(model, shared_experts=False), probes, device)
    gap = difference(off, reference, model.lm_head.weight, base.lm_head.weight)
    return [*checks, *_equal("gate off equals base", gap)]


def _equal(name: str, gap: Difference) -> list[Check]:
    return [
        Check(f"{name}: largest difference of hidden states", gap.hidden, 0.0, gap.hidden == 0),
        Check(f"{name}: largest difference of logits", gap.logit, 0.0, gap.logit == 0),
    ]


def _trainable(model: Any) -> list[str]:
    return trainable_names(model, train_router=True)


def _probes(vocab_size: int, seed: int) -> list[WindowBatch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (PROBES, PROBE_TOKENS)
    ids = torch.randint(vocab_size, shape, generator=generator)
    nothing = torch.zeros(shape, dtype=torch.bool)
    batch = WindowBatch(
        input_ids_BS=ids,
        position_ids_BS=torch.arange(PROBE_TOKENS).expand(shape),
        target_BS=ids,
        scored_BS=nothing,
        value_BS=nothing,
        document_B=torch.arange(PROBES),
    )
    return [batch]
