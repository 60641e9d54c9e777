"""What a machine has free, what a model takes of it, and what happens when it runs out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nexus_cli.errors import ResourceError
from nexus_cli.io import model_dir

_MEMINFO = Path("/proc/meminfo")


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on ``device`` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if _MEMINFO.exists():
        lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024  # counts what the cache gives back
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_disk(path: Path) -> int:
    """Bytes free where ``path`` is, or would be."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def weight_bytes(model: Path, dtype: torch.dtype) -> int:
    """Memory of a model's weights: packed experts as they are, the rest in ``dtype``."""
    packed = values = 0
    files = model_dir.weight_map(model)
    for shard in sorted(set(files.values())):
        for name, tensor in model_dir.read_header(model / shard).items():
            if files.get(name) != shard:
                continue
            start, end = tensor["data_offsets"]
            if tensor["dtype"] == "U8":
                packed += end - start
            else:
                width = 4 if tensor["dtype"] == "F32" else 2
                values += (end - start) // width
    return packed + values * dtype.itemsize


@contextmanager
def memory_on(device: torch.device, hint: str) -> Iterator[None]:
    """Run a block that may use up the device's memory.

    Raises:
        ResourceError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"out of memory on {device}", hint=hint) from error


def gib(count: float) -> str:
    """Bytes as text."""
    return f"{count / 2**30:.2f} GiB"
