"""What a machine has free, and what a model takes of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from nexus_cli.io import model_dir, tensor_files
from nexus_cli.io.tensor_files import Tensor

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


def weight_bytes(model: Path, dtype: torch.dtype, *, decoded: bool = False) -> int:
    """Memory of a model's weights: packed experts as they are or decoded, the rest in ``dtype``."""
    found = tensor_files.tensors(model)
    return sum(tensor_bytes(*item, dtype, decoded=decoded) for item in found.items())


def tensor_bytes(name: str, tensor: Tensor, dtype: torch.dtype, *, decoded: bool = False) -> int:
    """Memory of one of a model's tensors.

    Args:
        name: in the checkpoint.
        tensor: as stored.
        dtype: that it is loaded in, if it is not packed.
        decoded: whether packed experts are: a byte is two weights of bf16, the scales go.
    """
    if tensor.dtype != "U8":
        return tensor.size * dtype.itemsize
    if not decoded:
        return tensor.size
    return 4 * tensor.size if name.endswith("_blocks") else 0


def forward_bytes(model: Path, sequences: int, length: int, dtype: torch.dtype) -> int:
    """Peak of one layer's forward pass beside its weights; an estimate.

    Attention and experts do not peak together. Eager attention holds its scores
    ``[sequences, heads, length, length]`` whole, and about four copies of them.
    """
    shape, heads = model_dir.read_shape(model), model_dir.read_config(model)["num_attention_heads"]
    attention = 4 * int(heads) * length
    experts = 4 * shape.top_k * (shape.intermediate_size + shape.hidden_size)
    a_token = 12 * shape.hidden_size + max(attention, experts)
    return sequences * length * a_token * dtype.itemsize


def gib(count: float) -> str:
    """Bytes as text."""
    return f"{count / 2**30:.2f} GiB"
