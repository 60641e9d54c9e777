"""Write a safetensors file tensor by tensor, so that all of them are never in memory at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# In safetensors' own order: wide types first, so that every tensor begins where its type may.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_ALIGNMENT = 8  # of the header


@dataclass(frozen=True)
class TensorStream:
    """Tensors that are made while they are written.

    Attributes:
        layout: their names, dtypes and shapes; best on the meta device.
        tensors: by name, each of the layout once, in any order, on any device.
    """

    layout: Mapping[str, Tensor]
    tensors: Iterable[tuple[str, Tensor]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> TensorStream:
        """Tensors that are there already."""
        return cls(tensors, tensors.items())


def write_shard(path: Path, stream: TensorStream) -> None:
    """Write ``stream`` as safetensors' ``save_file`` would write all of it, byte for byte.

    Raises:
        OSError: the file cannot be written.
        ValueError: a dtype that no checkpoint of the family has, or a stream that does not hold
            what its layout says.
    """
    header, begins = _header(stream.layout)
    missing = dict(stream.layout)
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in stream.tensors:
            planned = missing.pop(name, None)
            if planned is None or (planned.dtype, planned.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(f"{name} is not as the layout says: {tensor.dtype} {tensor.shape}")
            file.seek(len(header) + begins[name])
            stored = tensor.detach().cpu().contiguous()
            file.write(stored.view(-1).view(torch.uint8).numpy().data)
    if missing:
        raise ValueError(f"the stream lacks {min(missing)}")


def layout_bytes(layout: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors of a layout."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in layout.values())


def _header(layout: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The file's beginning, and where behind it each tensor begins."""
    if foreign := {tensor.dtype for tensor in layout.values()} - _NAMES.keys():
        raise ValueError(f"no shard holds {foreign.pop()}")
    order = list(_NAMES)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(layout, key=lambda name: (order.index(layout[name].dtype), name)):
        tensor = layout[name]
        begins[name], end = end, end + layout_bytes({name: tensor})
        spans = [begins[name], end]
        shape, dtype = list(tensor.shape), _NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": spans}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, begins
