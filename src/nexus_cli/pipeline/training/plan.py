"""``--dry-run``: what a run would do, what it would take, and whether that is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nexus_cli.core.model.gpt_oss.surgery import ROUTER, SHARED_EXPERT
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ResourceError
from nexus_cli.io import console, model_dir, tensor_files
from nexus_cli.io.tensor_files import Tensor
from nexus_cli.pipeline.capacity import free_disk, free_memory, gib
from nexus_cli.pipeline.training.request import Request

LOGIT_BUFFERS = 4  # float32 [chunk, vocabulary] that the head loss holds at its peak


@dataclass(frozen=True)
class Memory:
    """Bytes on the student's device, by what they are for.

    Attributes:
        weights: frozen weights, experts packed.
        training: masters, gradients, moments and the anchor of what trains.
        activations: kept for the backward pass of one micro-batch; an estimate.
        head: logits of one chunk of positions, and the gradient of the hidden states.
    """

    weights: int
    training: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.training + self.activations + self.head


def describe(request: Request, directory: Path, device: torch.device) -> None:
    """Print the plan.

    Raises:
        ResourceError: memory or disk do not suffice.
    """
    tensors = tensor_files.tensors(request.student.path)
    trained = count_trained(tensors, train_router=request.config.router_trains)
    memory = estimate_memory(request, tensors, sum(trained.values()), device)
    disk = checkpoint_bytes(sum(trained.values()), request.config.runtime.keep_last)
    free, room = free_memory(device), free_disk(directory)
    console.result_table(
        f"nexus {request.command} would",
        ("what", "value"),
        [
            *_work(request, directory),
            *((f"train {kind}", f"{count:,} parameters") for kind, count in trained.items()),
            ("hold frozen weights", gib(memory.weights)),
            ("hold masters, gradients, moments", gib(memory.training)),
            ("hold activations (estimate)", gib(memory.activations)),
            ("hold logits of a chunk", gib(memory.head)),
            ("need in all", f"{gib(memory.total)} of {gib(free)} free on {device}"),
            ("write checkpoints", f"{gib(disk)} of {gib(room)} free"),
        ],
    )
    if memory.total > free:
        raise ResourceError(
            f"the run needs about {gib(memory.total)} on {device}, and {gib(free)} are free",
            hint="lower --batch-size, or use --set runtime.gradient_checkpointing=true",
        )
    if disk > room:
        raise ResourceError(
            f"the checkpoints need {gib(disk)}, and {gib(room)} are free at {directory}",
            hint="lower --keep-last, or choose another --output-dir",
        )


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
        teacher = str(request.store.path)
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


def count_trained(tensors: dict[str, Tensor], *, train_router: bool) -> dict[str, int]:
    """Parameters that would train, by group."""
    counts = {"shared experts": 0, "gates": 0} | ({"routers": 0} if train_router else {})
    for name, tensor in tensors.items():
        if name.endswith("output_gate"):
            counts["gates"] += tensor.size
        elif SHARED_EXPERT.fullmatch(name):
            counts["shared experts"] += tensor.size
        elif train_router and ROUTER.fullmatch(name):
            counts["routers"] += tensor.size
    return counts


def estimate_memory(
    request: Request, tensors: dict[str, Tensor], trained: int, device: torch.device
) -> Memory:
    """Bytes that a run takes on the student's device."""
    config = request.config
    wide = torch.finfo(frozen_dtype(config.dtype, device)).bits // 8
    weights = sum(
        tensor.size * (1 if tensor.dtype == "U8" else wide)
        for name, tensor in tensors.items()
        if not SHARED_EXPERT.fullmatch(name)
    )
    copies = 4 + (1 if config.averaging.every else 0)  # master, gradient, two moments, anchor
    model = model_dir.read_config(request.student.path)
    positions = request.batch_size * request.seq_len
    layers = request.shape.num_layers
    kept = _layer_bytes(request, model, wide) * positions
    if config.runtime.gradient_checkpointing:
        kept += (layers - 1) * positions * request.shape.hidden_size * wide
        kept += wide * trained // layers  # masters as they are cast on use
    else:
        kept = kept * layers + wide * trained
    chunk = min(config.runtime.head_chunk, positions)
    head = LOGIT_BUFFERS * 4 * chunk * request.shape.vocab_size
    head += 2 * positions * request.shape.hidden_size * wide
    return Memory(weights, 4 * copies * trained, kept, head)


def _layer_bytes(request: Request, model: dict[str, Any], wide: int) -> int:
    """Bytes a token that one layer keeps for its backward pass, attention scores included."""
    shape = request.shape
    heads, width = int(model["num_attention_heads"]), int(model.get("head_dim", 64))
    projected = (heads + 2 * int(model["num_key_value_heads"])) * width
    numbers = 4 * shape.hidden_size + projected + heads * width
    numbers += shape.top_k * (2 * shape.intermediate_size + 2 * shape.hidden_size)
    numbers += 6 * shape.shared_intermediate_size
    return wide * (numbers + 3 * heads * request.seq_len)


def checkpoint_bytes(trained: int, keep_last: int) -> int:
    """Disk for the kept checkpoints: bf16 tensors, and fp32 state in the newest two."""
    return keep_last * 2 * trained + min(keep_last, 2) * 12 * trained
