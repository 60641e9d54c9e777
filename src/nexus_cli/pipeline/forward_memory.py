"""Spend the memory that forward-only stages leave free on experts kept decoded."""

from __future__ import annotations

import logging
from typing import Any

import torch

from nexus_cli.pipeline.capacity import free_memory

log = logging.getLogger(__name__)

SPARE = 4 * 2**30  # logits of a chunk, statistics, and the allocator's gaps


def keep_decoded(model: Any, tokens: int, device: torch.device) -> None:
    """Let the engine decode what fits beside forward passes of ``tokens``, and say so.

    Args:
        model: a :class:`NexusGptOssForCausalLM`; nothing is done where it has no engine.
        tokens: positions of the largest batch.
        device: the model's.
    """
    engine = model.model.engine
    if engine is not None:
        budget = free_memory(device) - engine.transient_bytes(tokens) - SPARE
        log.info("%s", engine.plan_forward(tokens=tokens, budget_bytes=budget))
