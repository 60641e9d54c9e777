"""How a run spends the memory of its GPU: what comes first, and what is left for activations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nexus_cli.core.model.gpt_oss.engine.attach import Engine, EnginePlan
from nexus_cli.core.model.gpt_oss.engine.graphs import MAX_TOKENS
from nexus_cli.core.model.gpt_oss.engine.memory import ActivationPlan
from nexus_cli.core.model.gpt_oss.engine.policy import describe
from nexus_cli.errors import ResourceError
from nexus_cli.pipeline.capacity import gib
from nexus_cli.pipeline.model_memory import EngineOnDisk
from nexus_cli.pipeline.training.fitting import what_fits
from nexus_cli.pipeline.training.optimizer import training_bytes
from nexus_cli.pipeline.training.request import Request

log = logging.getLogger(__name__)

SPARE = 2**30  # for the allocator's gaps and the libraries' own workspaces
LOGIT_BUFFERS = 3  # float32 [chunk, vocabulary] of the head loss: student, teacher, gradient
PLAIN_LOGIT_BUFFERS = 4  # without the head's kernels, which know the forward KL alone
GRADIENT = 4  # bytes of a gradient that is summed
HIDDEN_STATES = 4  # bf16 [positions, hidden]: of student and teacher, and their gradients


@dataclass(frozen=True)
class Needs:
    """Bytes that a run asks for after its frozen weights, whatever the layers keep.

    Attributes:
        training: masters, gradients, moments and the anchor of what trains.
        peak: of one layer's backward pass, and the decoding buffer.
        head: logits of one chunk of positions, and hidden states.
        graphs: what CUDA graphs hold beside all this: the teacher's layer, and gradients that
            are summed elsewhere.
    """

    training: int
    peak: int
    head: int
    graphs: int = 0

    @classmethod
    def of(cls, engine: Engine, request: Request, sizes: Sequence[int]) -> Needs:
        """Of a run whose trained tensors are of these sizes."""
        positions = request.batch_size * request.seq_len
        chunk = min(request.config.runtime.head_chunk, positions)
        peak = engine.transient_bytes(positions)
        graphs = peak if captures(engine, request) else 0
        if request.teacher is not None and _shares_device(request):
            peak *= 2  # a teacher on the same GPU runs ahead of the student's backward pass
        buffers = LOGIT_BUFFERS
        if request.config.loss.divergence != "forward":
            buffers = PLAIN_LOGIT_BUFFERS
        summed = request.config.gradient_accumulation_steps > 1 or request.world_size > 1
        if graphs and summed:
            graphs += GRADIENT * sum(sizes)
        return cls(
            training=training_bytes(request, sizes),
            peak=peak,
            graphs=graphs,
            head=buffers * 4 * chunk * request.shape.vocab_size
            + HIDDEN_STATES * 2 * positions * request.shape.hidden_size,
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.training + self.peak + self.head + self.graphs


def captures(engine: Engine, request: Request) -> bool:
    """Whether the layers of a run's micro-batches are replayed as CUDA graphs."""
    runtime = request.config.runtime
    small = request.batch_size * request.seq_len <= MAX_TOKENS
    eager = engine.waits_for_host or runtime.gradient_checkpointing
    return runtime.cuda_graphs and small and not eager


def _shares_device(request: Request) -> bool:
    runtime = request.config.runtime
    return runtime.teacher_device in (None, runtime.device)


def spend_memory(
    engine: Engine, request: Request, masters: Mapping[str, Tensor], device: torch.device
) -> None:
    """Decide what each layer keeps for the backward pass, by what is free on ``device`` now.

    Weights are loaded already; gradients, moments, the head's buffers and one layer's peak are
    still to come and are set aside first.

    Args:
        engine: of the student.
        request: the run.
        masters: what trains, by name; in memory already.
        device: the student's.

    Raises:
        ResourceError: not even the layers' inputs fit.
    """
    sizes = [master.numel() for master in masters.values()]
    needs = Needs.of(engine, request, sizes)
    free = available(device, request.config.runtime.memory_gib)
    free += sum(master.nbytes for master in masters.values())
    plan = plan_layers(engine, request, needs, sizes, free=free, device=device)
    for line in plan.describe():
        log.info("%s", line)
    if plan.graphs:
        accumulates = request.config.gradient_accumulation_steps > 1
        engine.capture(request.batch_size, request.seq_len, accumulates=accumulates)


def least_bytes(request: Request, sizes: Sequence[int]) -> int:
    """What a run takes beside its frozen weights if its layers keep their inputs alone.

    Args:
        request: the run.
        sizes: of the trained tensors.
    """
    engine = EngineOnDisk(request.student.path, request.config.runtime.experts_backend)
    positions = request.batch_size * request.seq_len
    inputs = engine.least_bytes(positions)
    if request.config.runtime.gradient_checkpointing:  # which decodes a layer whole
        inputs = len(engine.kept) * engine.layer_bytes.input * positions
    return Needs.of(engine, request, sizes).total + SPARE + inputs


def plan_layers(
    engine: Engine,
    request: Request,
    needs: Needs,
    sizes: Sequence[int],
    *,
    free: int,
    device: torch.device,
) -> EnginePlan:
    """Decide what each layer keeps, by a number of free bytes.

    Args:
        engine: of the student, loaded or on disk.
        request: the run.
        needs: what comes before the layers.
        sizes: of the trained tensors.
        free: bytes that can be had where the frozen weights are loaded and nothing else is.
        device: the student's, for the message.

    Raises:
        ResourceError: not even the layers' inputs fit.
    """
    positions = request.batch_size * request.seq_len
    if request.config.runtime.gradient_checkpointing:
        engine.recompute()
        inputs = len(engine.kept) * engine.layer_bytes.input * positions
        shape = request.shape
        words = describe(engine.backend, positions, shape.top_k, shape.num_experts)
        return EnginePlan(words, ActivationPlan(engine.kept, 0, inputs, 0))
    budget = free - needs.total - SPARE
    try:
        plan = engine.plan_training(tokens=positions, budget_bytes=budget)
    except ValueError as error:
        raise ResourceError(
            f"a batch of {positions:,} tokens does not fit on {device}: {error}; masters, "
            f"gradients, moments, logits and one layer's peak take {gib(needs.total)}",
            hint=what_fits(
                request,
                lambda changed: least_bytes(changed, sizes),
                free,
                beside=" beside the frozen weights",
            ),
        ) from error
    return replace(plan, graphs=captures(engine, request))


def available(device: torch.device, limit_gib: float | None) -> int:
    """Bytes that can still be asked for: what is free and what the allocator holds unused."""
    stats: dict[str, Any] = torch.cuda.memory_stats(device)
    taken = int(stats.get("allocated_bytes.all.current", 0))
    held = int(stats.get("reserved_bytes.all.current", 0))
    free = torch.cuda.mem_get_info(device)[0] + held - taken
    if limit_gib is None:
        return free
    return min(free, int(limit_gib * 2**30) - taken)
