"""What ``nexus precompute --dry-run`` says: the work, and whether it fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ResourceError
from nexus_cli.io import console, model_dir
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.pipeline.inputs import Artifact
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
    disk, free_disk = _store_bytes(config), shutil.disk_usage(_existing(folder)).free
    memory, free_memory = _memory_bytes(config, teacher, shape, device), _free_memory(device)
    console.result_table(
        "nexus precompute would",
        ("what", "value"),
        [
            ("ask", teacher.path),
            ("on", device),
            ("about", ", ".join(f"{s.name}@{s.split} ({s.origin})" for s in sources)),
            ("sequences", f"{num_rows:,} x {config.data.seq_len} tokens"),
            ("keep", f"{config.top_k} of {shape.vocab_size:,} tokens a position, and the rest"),
            ("take about", f"{_gib(memory)} of {_gib(free_memory)} of memory free on {device}"),
            ("write at most", f"{_gib(disk)} of {_gib(free_disk)} free"),
            ("to", folder),
        ],
    )
    if disk > free_disk:
        raise ResourceError(
            f"{folder} has no room for {_gib(disk)}",
            hint="use fewer --num-steps, a smaller --top-k, or another --output-dir",
        )
    if memory > free_memory:
        raise ResourceError(
            f"{device} has no memory for {_gib(memory)}", hint="name another with --device"
        )


def _store_bytes(config: PrecomputeConfig) -> int:
    """Before compression: ids, log-probabilities, tail, nll, text and positions."""
    entry = 4 + (2 if config.precision == "float16" else 4)
    tokens = config.num_steps * config.batch_size * config.data.seq_len
    return tokens * (config.top_k * entry + 17)


def _memory_bytes(
    config: PrecomputeConfig, teacher: Artifact, shape: ModelShape, device: torch.device
) -> int:
    """Packed experts as they are on disk, the rest in the dtype it runs in, and logits."""
    packed = other = 0
    files = model_dir.weight_map(teacher.path)
    for shard in sorted(set(files.values())):
        for name, tensor in model_dir.read_header(teacher.path / shard).items():
            if name != "__metadata__" and files.get(name) == shard:
                start, end = tensor["data_offsets"]
                if tensor["dtype"] == "U8":
                    packed += end - start
                else:
                    other += end - start
    wide = frozen_dtype(config.dtype, device) == torch.float32
    logits = _LOGIT_BUFFERS * _CHUNK * shape.vocab_size * 4
    return packed + other * (2 if wide else 1) + logits


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
