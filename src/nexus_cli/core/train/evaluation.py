"""Loss on held-out text, between two steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.teacher import Teacher
from nexus_cli.core.distributed import World
from nexus_cli.core.train.record import add_sums, reduce_sums
from nexus_cli.core.train.step import DistillationStep, Objective, SourceWeights, StepScale


@dataclass(frozen=True)
class HeldOut:
    """Text that no step learns from.

    Attributes:
        sources: names, in the order of ``Batch.source_B``.
        batches: this rank's part, on the CPU.
        chunk_size: positions whose logits exist at one time.
    """

    sources: Sequence[str]
    batches: Sequence[Batch]
    chunk_size: int = 256


@torch.no_grad()
def evaluate(
    step: DistillationStep,
    held_out: HeldOut,
    teacher: Teacher | None,
    world: World,
) -> dict[str, dict[str, float]]:
    """Cross entropy, perplexity and KL from the teacher of every held-out source.

    Pure sums over tokens: no auxiliary loss is in them, and neither batch size nor the number
    of ranks changes them.

    Args:
        step: the student, not wrapped: nothing is reduced in its forward.
        held_out: the text.
        teacher: ``None`` leaves the KL out.
        world: every rank takes part with its own batches.
    """
    weights = [SourceWeights(ce=1.0, kd=0.0 if teacher is None else 1.0, router=0.0)]
    plain = DistillationStep(
        step.model, Objective(weights * len(held_out.sources), chunk_size=held_out.chunk_size)
    ).to(world.device)
    zeros = torch.zeros(len(held_out.sources), dtype=torch.float64, device=world.device)
    sums = {f"{name}_K": zeros for name in ("ce", "ce_count", "kd", "kd_count", "tokens")}
    for batch in held_out.batches:
        here = batch.to(world.device)
        signal = None if teacher is None else teacher.signal(here)
        output = plain(here, signal, StepScale(tokens=1, sequences=1))
        add_sums(sums, {name: output.sums[name] for name in sums})
    total = reduce_sums(sums, world)
    results = {}
    for k, name in enumerate(held_out.sources):
        if (count := float(total["ce_count_K"][k])) == 0:
            continue
        loss = float(total["ce_K"][k]) / count
        results[name] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if teacher is not None:
            results[name]["kd"] = float(total["kd_K"][k]) / count
    return results
