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

_CHUNK = 1024  # positions whose logits exist at once
_LOGIT_BUFFERS = 3


def describe(config: PrecomputeConfig, teacher: Artifact, shape: ModelShape, folder: Path) -> None:
    """Print the work; refuse it if it does not fit.

    Raises:
        ResourceError: too little memory or disk.
    """
    sources = describe_sources(config.data, default_split="train")
    device = open_world(config.runtime.device).device
    num_rows = config.num_steps * config.batch_size
    disk, disk_left = _store_bytes(config), free_disk(folder)
    memory, memory_left = _memory_bytes(config, teacher, shape, device), free_memory(device)
    console.result_table(
        "nexus precompute would",
        ("what", "value"),
        [
            ("ask", teacher.path),
            ("on", device),
            ("about", ", ".join(f"{s.name}@{s.split} ({s.origin})" for s in sources)),
            ("sequences", f"{num_rows:,} x {config.data.seq_len} tokens"),
            ("keep", f"{config.top_k} of {shape.vocab_size:,} tokens a position, and the rest"),
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


def _store_bytes(config: PrecomputeConfig) -> int:
    """Before compression: ids, log-probabilities, tail, nll, text and positions."""
    entry = 4 + (2 if config.precision == "float16" else 4)
    tokens = config.num_steps * config.batch_size * config.data.seq_len
    return tokens * (config.top_k * entry + 17)


def _memory_bytes(
    config: PrecomputeConfig, teacher: Artifact, shape: ModelShape, device: torch.device
) -> int:
    """Weights, the forward pass of a batch, and the logits of a chunk."""
    dtype = frozen_dtype(config.dtype, device)
    place = Placement(device, dtype, config.runtime.experts_backend)
    layer = place.forward_bytes(teacher.path, config.batch_size, config.data.seq_len)
    logits = _LOGIT_BUFFERS * _CHUNK * shape.vocab_size * 4
    return place.weight_bytes(teacher.path) + layer + logits
