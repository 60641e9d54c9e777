"""What ``nexus precompute --dry-run`` says: the work, and whether it fits."""

from __future__ import annotations

from pathlib import Path

import torch

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ResourceError
from nexus_cli.io import console
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.pipeline.capacity import free_disk, free_memory, gib
from nexus_cli.pipeline.inputs import Artifact
from nexus_cli.pipeline.model_memory import Placement
from nexus_cli.pipeline.text import describe_sources
from nexus_cli.pipeline.world import open_world

_CHUNK = 2048  # positions whose logits exist at once, as top_k has it
_LOGIT_BUFFERS = 3
_BYTES_A_DRAW = 12 * 1024  # of a sample of the tail, beside the logits


def describe(config: PrecomputeConfig, teacher: Artifact, shape: ModelShape, folder: Path) -> None:
    """Print the work; refuse it if it does not fit.

    Raises:
        ResourceError: too little memory or disk.
    """
    sources = describe_sources(config.data, default_split="train")
    device = open_world(config.runtime.device).device
    num_rows = config.num_steps * config.batch_size
    disk, disk_left = _store_bytes(config, shape), free_disk(folder)
    memory, memory_left = _memory_bytes(config, teacher, shape, device), free_memory(device)
    console.result_table(
        "nexus precompute would",
        ("what", "value"),
        [
            ("ask", teacher.path),
            ("on", device),
            ("about", ", ".join(f"{s.name}@{s.split} ({s.origin})" for s in sources)),
            ("sequences", f"{num_rows:,} x {config.data.seq_len} tokens"),
            ("keep", _kept(config, shape)),
            ("take about", f"{gib(memory)} of {gib(memory_left)} of memory free on {device}"),
            ("write at most", f"{gib(disk)} of {gib(disk_left)} free"),
            ("to", folder),
        ],
    )
    if disk > disk_left:
        raise ResourceError(
            f"{folder} has no room for {gib(disk)}",
            hint="use fewer --num-steps, a smaller --top-k, or another --output-dir",
        )
    if memory > memory_left:
        raise ResourceError(
            f"{device} has no memory for {gib(memory)}",
            hint="lower --batch-size, or name another --device",
        )


def _store_bytes(config: PrecomputeConfig, shape: ModelShape) -> int:
    """Before compression: ids, log-probabilities, tails, nll, text, and what else is asked for."""
    entry = 2.25 + (1 if config.values == "codes" else 4)
    position = 18 if config.values == "codes" else 24
    experts = shape.num_layers * shape.top_k if config.experts else 0
    token = config.top_k * entry + position + 2.25 * config.tail_samples + experts
    return int(config.num_steps * config.batch_size * config.data.seq_len * token)


def _memory_bytes(
    config: PrecomputeConfig, teacher: Artifact, shape: ModelShape, device: torch.device
) -> int:
    """Weights, the forward pass of a batch, and the logits of a chunk."""
    dtype = frozen_dtype(config.dtype, device)
    place = Placement(device, dtype, config.runtime.experts_backend)
    layer = place.forward_bytes(teacher.path, config.batch_size, config.data.seq_len)
    positions = min(_CHUNK, config.batch_size * config.data.seq_len)
    logits = _LOGIT_BUFFERS * positions * shape.vocab_size * 4
    samples = _BYTES_A_DRAW * positions * config.tail_samples
    return place.weight_bytes(teacher.path) + layer + logits + samples


def _kept(config: PrecomputeConfig, shape: ModelShape) -> str:
    of = f"of {shape.vocab_size:,} tokens a position, and the mass of the rest"
    if config.top_p >= 1:
        return f"{config.top_k} {of}"
    least = min(config.min_k, config.top_k)
    return f"the likeliest to {100 * config.top_p:g}% of the mass, {least} to {config.top_k} {of}"
