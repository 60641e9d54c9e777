"""``--dry-run``: what a run would do, what it would take, and whether that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nexus_cli.core.model.gpt_oss.surgery import SHARED_EXPERT, trains
from nexus_cli.core.train.checkpoints import WITH_STATE
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ResourceError
from nexus_cli.io import console, model_dir, tensor_files
from nexus_cli.io.tensor_files import Tensor
from nexus_cli.pipeline.capacity import free_disk, free_memory, gib, tensor_bytes
from nexus_cli.pipeline.model_memory import EngineOnDisk, Placement
from nexus_cli.pipeline.training.duration import describe_duration
from nexus_cli.pipeline.training.fitting import what_fits
from nexus_cli.pipeline.training.memory import (
    SPARE,
    Needs,
    available,
    least_bytes,
    plan_layers,
)
from nexus_cli.pipeline.training.optimizer import (
    cast_numbers,
    require_exact_sums,
    state_bytes,
    training_bytes,
)
from nexus_cli.pipeline.training.request import Request

LOGIT_BUFFERS = 4  # float32 [chunk, vocabulary] that the head loss holds at its peak


@dataclass(frozen=True)
class Memory:
    """Bytes on the student's device, by what they are for.

    Attributes:
        weights: frozen weights, experts packed or decoded.
        training: masters, gradients, moments and the anchor of what trains.
        activations: kept for the backward pass of one micro-batch; without the engine an estimate.
        head: logits of one chunk of positions, and the gradient of the hidden states.
        teacher: weights of a teacher model on the same device; counted with the engine alone.
        engine: what the engine takes besides: a layer's peak, layers kept decoded, what is spare.
    """

    weights: int
    training: int
    activations: int
    head: int
    teacher: int = 0
    engine: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        held = self.weights + self.training + self.activations + self.head
        return held + self.teacher + self.engine


def describe(
    request: Request, directory: Path, device: torch.device, teacher_device: torch.device
) -> None:
    """Print the plan.

    Raises:
        ResourceError: memory or disk do not suffice.
        ConfigError: the optimizer cannot sum gradients as the step is split.
        ArtifactError: the metrics of an earlier run in ``directory`` are damaged.
    """
    require_exact_sums(request)
    tensors = tensor_files.tensors(request.student.path)
    routers = {
        "train_router": request.config.whole_router_trains,
        "train_router_bias": request.config.train_router_bias,
    }
    trained, sizes = count_trained(tensors, **routers), trained_sizes(tensors, **routers)
    disk, room = checkpoint_bytes(request, sizes), free_disk(directory)
    kept: list[tuple[str, str]] = []
    if _placement(request, device).has_engine:
        free = available(device, request.config.runtime.memory_gib)
        beside = teacher_device == device
        memory, lines = plan_engine(request, tensors, sizes, device, free, teacher_beside=beside)
        kept = [(line.partition(": ")[0], line.partition(": ")[2]) for line in lines]
    else:
        free, memory = free_memory(device), estimate_memory(request, tensors, sizes, device)
    console.result_table(
        f"nexus {request.command} would",
        ("what", "value"),
        [
            *_work(request, directory),
            *((f"train {kind}", f"{count:,} parameters") for kind, count in trained.items()),
            *_holdings(memory),
            *kept,
            ("need in all", f"{gib(memory.total)} of {gib(free)} free on {device}"),
            ("write checkpoints", f"{gib(disk)} of {gib(room)} free"),
            ("run for", describe_duration(request, directory, device)),
        ],
    )
    if memory.total > free:
        beside = teacher_device == device

        def need(changed: Request) -> int:
            return least_memory(changed, tensors, sizes, device, teacher_beside=beside)

        raise ResourceError(
            f"the run needs about {gib(memory.total)} on {device}, and {gib(free)} are free",
            hint=what_fits(request, need, free),
        )
    if disk > room:
        raise ResourceError(
            f"the checkpoints need {gib(disk)}, and {gib(room)} are free at {directory}",
            hint="lower --keep-last, or choose another --output-dir",
        )


def _holdings(memory: Memory) -> list[tuple[str, str]]:
    guess = "" if memory.engine else " (estimate)"
    rows = [
        ("hold frozen weights", memory.weights),
        ("hold the teacher's weights", memory.teacher),
        ("hold masters, gradients, moments", memory.training),
        (f"hold activations{guess}", memory.activations),
        ("hold logits of a chunk", memory.head),
        ("set aside for the engine", memory.engine),
    ]
    return [(label, gib(count)) for label, count in rows if count]


def steps_sentence(request: Request) -> str:
    """How the number of optimizer steps comes about."""
    accumulation, ranks = request.config.gradient_accumulation_steps, request.world_size
    if request.store is None:
        return f"{request.max_steps:,} optimizer steps of {request.sequences_per_step} sequences"
    stored = len(request.store) // request.batch_size
    return (
        f"{stored:,} stored steps / ({accumulation} x {ranks}) = "
        f"{stored // (accumulation * ranks):,} optimizer steps"
        + ("" if request.config.max_steps is None else f"; {request.max_steps:,} asked for")
    )


def _work(request: Request, directory: Path) -> list[tuple[str, object]]:
    tokens = request.max_steps * request.sequences_per_step * request.seq_len
    teacher = "the student without its shared experts"
    if request.store is not None:
        teacher = request.store.folder.shown
    elif request.teacher is not None:
        teacher = str(request.teacher.path)
    rows: list[tuple[str, object]] = [
        ("train", request.student.path),
        ("taught by", teacher),
        ("take", steps_sentence(request)),
        (
            "split a step into",
            f"{request.world_size} rank(s) x {request.config.gradient_accumulation_steps} "
            f"forward passes x {request.batch_size} sequences of {request.seq_len} tokens",
        ),
        ("read at most", f"{tokens:,} tokens"),
    ]
    for name, weights in zip(request.sources, request.weights, strict=True):
        shown = f"ce {weights.ce:g}, kd {weights.kd:g}, router {weights.router:g}"
        rows.append((f"learn from {name}", shown))
    return [*rows, ("write to", directory)]


def count_trained(
    tensors: dict[str, Tensor], *, train_router: bool, train_router_bias: bool = False
) -> dict[str, int]:
    """Parameters that would train, by group."""
    counts = {"shared experts": 0, "gates": 0}
    routers = "routers" if train_router else "router biases"
    for name, tensor in tensors.items():
        if name.endswith("output_gate"):
            counts["gates"] += tensor.size
        elif SHARED_EXPERT.fullmatch(name):
            counts["shared experts"] += tensor.size
        elif trains(name, train_router=train_router, train_router_bias=train_router_bias):
            counts[routers] = counts.get(routers, 0) + tensor.size
    return counts


def trained_sizes(
    tensors: dict[str, Tensor], *, train_router: bool, train_router_bias: bool = False
) -> list[int]:
    """Numbers in each tensor that would train."""
    return [
        tensor.size
        for name, tensor in tensors.items()
        if trains(name, train_router=train_router, train_router_bias=train_router_bias)
    ]


def plan_engine(
    request: Request,
    tensors: dict[str, Tensor],
    sizes: Sequence[int],
    device: torch.device,
    free: int,
    *,
    teacher_beside: bool,
) -> tuple[Memory, list[str]]:
    """What a run through the engine takes of ``free`` bytes, and what it keeps, in lines.

    The same sums as :func:`~nexus_cli.pipeline.training.memory.spend_memory` does once the
    models are loaded.

    Args:
        request: the run.
        tensors: of the student's folder.
        sizes: of what trains.
        device: the student's.
        free: bytes to be had there before anything is loaded.
        teacher_beside: whether a teacher model goes to the same device.

    Raises:
        ResourceError: not even the layers' inputs fit.
    """
    place = _placement(request, device)
    weights = _frozen_bytes(tensors, place)
    teacher = 0
    if request.teacher is not None and teacher_beside:
        teacher = place.weight_bytes(request.teacher.path)
    engine = EngineOnDisk(request.student.path, place.backend)
    needs = Needs.of(engine, request, sizes)
    left = free - weights - teacher
    plan = plan_layers(engine, request, needs, sizes, free=left, device=device)
    memory = Memory(
        weights=weights,
        training=needs.training,
        activations=plan.activations.activation_bytes,
        head=needs.head,
        teacher=teacher,
        engine=needs.peak + needs.graphs + plan.activations.decoded_bytes + SPARE,
    )
    return memory, plan.describe()


def least_memory(
    request: Request,
    tensors: dict[str, Tensor],
    sizes: Sequence[int],
    device: torch.device,
    *,
    teacher_beside: bool,
) -> int:
    """The fewest bytes that a run can do with on the student's device.

    Args:
        request: the run.
        tensors: of the student's folder.
        sizes: of what trains.
        device: the student's.
        teacher_beside: whether a teacher model goes to the same device.
    """
    place = _placement(request, device)
    if not place.has_engine:
        return estimate_memory(request, tensors, sizes, device).total
    teacher = 0
    if request.teacher is not None and teacher_beside:
        teacher = place.weight_bytes(request.teacher.path)
    return _frozen_bytes(tensors, place) + teacher + least_bytes(request, sizes)


def estimate_memory(
    request: Request, tensors: dict[str, Tensor], sizes: Sequence[int], device: torch.device
) -> Memory:
    """Bytes that a run takes on the student's device, training tensors of these sizes."""
    config, place = request.config, _placement(request, device)
    wide, weights = place.dtype.itemsize, _frozen_bytes(tensors, place)
    model = model_dir.read_config(request.student.path)
    positions = request.batch_size * request.seq_len
    layers = request.shape.num_layers
    kept = _layer_bytes(request, model, wide) * positions
    cast = cast_numbers(request, sizes, wide)
    if config.runtime.gradient_checkpointing:
        kept += (layers - 1) * positions * request.shape.hidden_size * wide
        kept += wide * cast // layers  # masters as they are cast on use
    else:
        kept = kept * layers + wide * cast
    chunk = min(config.runtime.head_chunk, positions)
    head = LOGIT_BUFFERS * 4 * chunk * request.shape.vocab_size
    head += 2 * positions * request.shape.hidden_size * wide
    return Memory(weights, training_bytes(request, sizes), kept, head)


def _placement(request: Request, device: torch.device) -> Placement:
    dtype = frozen_dtype(request.config.dtype, device)
    return Placement(device, dtype, request.config.runtime.experts_backend)


def _frozen_bytes(tensors: dict[str, Tensor], place: Placement) -> int:
    return sum(
        tensor_bytes(name, tensor, place.dtype, decoded=place.decodes_all)
        for name, tensor in tensors.items()
        if not SHARED_EXPERT.fullmatch(name)
    )


def _layer_bytes(request: Request, model: dict[str, Any], wide: int) -> int:
    """Bytes a token that one layer keeps for its backward pass, attention scores included."""
    shape = request.shape
    heads, width = int(model["num_attention_heads"]), int(model.get("head_dim", 64))
    projected = (heads + 2 * int(model["num_key_value_heads"])) * width
    numbers = 4 * shape.hidden_size + projected + heads * width
    numbers += shape.top_k * (2 * shape.intermediate_size + 2 * shape.hidden_size)
    numbers += 6 * shape.shared_intermediate_size
    return wide * (numbers + 3 * heads * request.seq_len)


def checkpoint_bytes(request: Request, sizes: Sequence[int]) -> int:
    """Disk for the kept checkpoints: bf16 tensors, and the training state in the newest two."""
    models = (
        request.config.runtime.keep_last + request.keeps_best + 1
    )  # one more while it is written, before an old one goes
    return models * 2 * sum(sizes) + (WITH_STATE + 1) * state_bytes(request, sizes)
