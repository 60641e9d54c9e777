"""Compare the tensors of two model folders by their bytes, without loading either."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nexus_cli.errors import ArtifactError
from nexus_cli.io.model_dir import read_header, weight_map

CHUNK = 2**24


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's bytes are, and how they are read."""

    shard: Path
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers it holds."""
        size = 1
        for length in self.shape:
            size *= length
        return size


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, by name.

    Raises:
        ArtifactError: a shard is missing, truncated, or lacks a tensor that the index lists.
    """
    files = weight_map(path)
    headers = {name: _Header(path / name) for name in sorted(set(files.values()))}
    return {key: headers[name].tensor(key) for key, name in files.items()}


def num_parameters(found: dict[str, Tensor]) -> int:
    """Parameters as people count them: two to a byte of an MXFP4 block, none to its scales."""
    return sum(
        tensor.size * (2 if name.endswith("_blocks") else 1)
        for name, tensor in found.items()
        if not name.endswith("_scales")
    )


def differing(model: Path, base: Path) -> list[str]:
    """Names of the base's tensors that ``model`` lacks, or holds with other bytes.

    Tensors in a shard that both folders link are equal without being read.

    Raises:
        ArtifactError: as :func:`tensors`.
    """
    mine = tensors(model)
    return [
        name
        for name, tensor in tensors(base).items()
        if name not in mine or not _equal(mine[name], tensor)
    ]


class _Header:
    def __init__(self, shard: Path) -> None:
        self.shard = shard
        self.entries: dict[str, Any] = read_header(shard)
        with shard.open("rb") as file:
            self.start = 8 + int(struct.unpack("<Q", file.read(8))[0])

    def tensor(self, key: str) -> Tensor:
        if key not in self.entries:
            raise ArtifactError(f"{self.shard} lacks the tensor {key} that its index lists")
        entry = self.entries[key]
        begin, end = (self.start + offset for offset in entry["data_offsets"])
        return Tensor(self.shard, begin, end, entry["dtype"], tuple(entry["shape"]))


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.shard.samefile(other.shard):
        return one.begin == other.begin
    with one.shard.open("rb") as a, other.shard.open("rb") as b:
        return all(x == y for x, y in zip(_read(a, one), _read(b, other), strict=True))


def _read(file: BinaryIO, tensor: Tensor) -> Iterator[bytes]:
    file.seek(tensor.begin)
    for at in range(tensor.begin, tensor.end, CHUNK):
        yield file.read(min(CHUNK, tensor.end - at))
