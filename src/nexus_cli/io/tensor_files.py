"""Where the tensors of a model folder lie, their bytes, and whether two folders hold the same."""

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


def misplaced(path: Path) -> str | None:
    """What a shard holds though the index does not place it there, in words; ``None`` if nothing.

    transformers reads every tensor of every shard, so that a stale one of the same name would win
    over the listed one, or lose to it.

    Raises:
        ArtifactError: as :func:`tensors`.
    """
    files = weight_map(path)
    for name in sorted(set(files.values())):
        for key in read_header(path / name).keys() - {"__metadata__"}:
            if files.get(key) != name:
                return f"{name} holds {key}, which the index lists in {files.get(key, 'no shard')}"
    return None


def read_into(shard: Path, begin: int, into: memoryview) -> None:
    """Fill ``into`` with a file's bytes from ``begin`` on.

    Unlike a map of the file, this leaves nothing of it in the process's resident memory.

    Raises:
        ArtifactError: the file cannot be read, or ends too early.
    """
    left = into
    try:
        with shard.open("rb", buffering=0) as file:
            file.seek(begin)
            while left and (count := file.readinto(left)):
                left = left[count:]
    except OSError as error:
        raise ArtifactError(
            f"cannot read {shard}: {error.strerror or error}", hint="check the disk that it is on"
        ) from error
    if left:
        raise ArtifactError(
            f"{shard} is truncated: {len(left)} bytes are missing", hint="download it again"
        )


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
            raise ArtifactError(
                f"{self.shard} lacks the tensor {key} that its index lists",
                hint="download the index and all shards of one model",
            )
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
