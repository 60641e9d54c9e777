"""Put stored tensors on a device without a copy of them on the host.

For a GPU several threads read pieces of the files, in order, into a few pinned buffers. From
there a copy on a stream of its own takes a piece while the thread reads the next one, and the GPU
casts it where the formats differ. On the CPU a tensor is the mapped file itself, which the system
reads when it is used and can drop again; only what is cast takes memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus_cli.errors import ArtifactError
from nexus_cli.io import tensor_files
from nexus_cli.io.tensor_files import Tensor as Stored

PIECE = 2**25  # bytes; a multiple of every item size, and small beside the host's memory
READERS = 4  # one reads 4 to 10 GB/s from the page cache, a GPU's link takes 25 to 55
BUFFERS = 2  # of each reader: one is filled while the other is copied

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class _Piece:
    """Some of a tensor's bytes, and the flat items of the target that they become."""

    shard: Path
    begin: int
    dtype: torch.dtype
    target_N: Tensor

    @property
    def size(self) -> int:
        return self.target_N.numel() * self.dtype.itemsize


def fits(target: Tensor, stored: Stored) -> bool:
    """Whether ``stored`` can become ``target``: its shape, and floats for floats, bytes for bytes.

    Args:
        target: may be on the meta device.
        stored: as the file's header says.
    """
    dtype = DTYPES.get(stored.dtype)
    if dtype is None or tuple(target.shape) != stored.shape:
        return False
    whole = stored.end - stored.begin == stored.size * dtype.itemsize
    return whole and dtype.is_floating_point == target.is_floating_point()


def load(
    wanted: Mapping[str, Tensor], stored: Mapping[str, Stored], device: torch.device
) -> dict[str, Tensor]:
    """The tensors ``wanted``, with the stored values, on ``device``.

    It returns when all of them are there. On the host it needs ``READERS * BUFFERS * PIECE``
    bytes, pinned, for a GPU; half of that for the CPU, and there what is cast.

    Args:
        wanted: shapes and dtypes, by name; on the meta device.
        stored: of the same names; each :func:`fits`.
        device: where they go. On the CPU they may be private maps of the files: writing to one
            does not change the file.

    Raises:
        ArtifactError: a file cannot be read, or is damaged.
    """
    mapped = _map(wanted, stored) if device.type == "cpu" else {}
    read = {
        name: torch.empty_like(target, device=device, requires_grad=False)
        for name, target in wanted.items()
        if name not in mapped
    }
    _fill(read, stored, device)
    return mapped | read


def _map(wanted: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The tensors that are stored as they are wanted."""
    found: dict[str, Tensor] = {}
    same = [name for name in wanted if DTYPES[stored[name].dtype] == wanted[name].dtype]
    for path in {stored[name].shard for name in same}:
        try:
            with safe_open(path, framework="pt") as shard:
                for name in same:
                    if stored[name].shard == path:
                        found[name] = shard.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"cannot read {path}: {error}") from error
    return found


def _fill(
    targets: Mapping[str, Tensor], stored: Mapping[str, Stored], device: torch.device
) -> None:
    pieces = sorted(_pieces(targets, stored), key=lambda piece: (piece.shard, piece.begin))
    queue = _Queue(pieces)
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # the targets' memory may be in use
    with ThreadPoolExecutor(READERS, thread_name_prefix="read-weights") as pool:
        readers = [pool.submit(_read_all, queue, stream) for _ in pieces[:READERS]]
    for reader in readers:
        reader.result()
    if stream is not None:
        stream.synchronize()


def _pieces(targets: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> Iterator[_Piece]:
    for name, target in targets.items():
        source = stored[name]
        dtype = DTYPES[source.dtype]
        items = PIECE // dtype.itemsize
        for number, part_N in enumerate(target.view(-1).split(items)):
            if part_N.numel():
                yield _Piece(source.shard, source.begin + number * PIECE, dtype, part_N)


class _Queue:
    """Pieces in order, for several threads."""

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self._pieces = iter(pieces)
        self._lock = threading.Lock()

    def __iter__(self) -> _Queue:
        return self

    def __next__(self) -> _Piece:
        with self._lock:
            return next(self._pieces)

    def close(self) -> None:
        with self._lock:
            self._pieces = iter(())


def _read_all(queue: _Queue, stream: torch.cuda.Stream | None) -> None:
    """One thread's work: read and hand over pieces until there are no more."""
    try:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            staging = _Staging(stream)
            for piece in queue:
                staging.pass_on(piece)
    except BaseException:
        queue.close()  # the others need not go on
        raise


class _Staging:
    """Host buffers in turn, each free again when its copy has ended."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._buffers: list[Tensor] = []
        self._copied: list[torch.cuda.Event] = []
        self._turn = 0

    def pass_on(self, piece: _Piece) -> None:
        """Read a piece and start its copy; on the CPU, end it too."""
        turn, self._turn = self._turn, (self._turn + 1) % (BUFFERS if self._stream else 1)
        if turn == len(self._buffers):
            pinned = self._stream is not None
            self._buffers.append(torch.empty(PIECE, dtype=torch.uint8, pin_memory=pinned))
            if self._stream is not None:
                self._copied.append(torch.cuda.Event(blocking=True))
        elif self._stream is not None:
            self._copied[turn].synchronize()
        bytes_N = self._buffers[turn][: piece.size]
        _read(piece, bytes_N)
        if piece.dtype != piece.target_N.dtype and self._stream is not None:
            # Not in one copy: torch would cast on the host, and wait.
            bytes_N = bytes_N.to(piece.target_N.device, non_blocking=True)
        piece.target_N.copy_(bytes_N.view(piece.dtype), non_blocking=True)
        if self._stream is not None:
            self._copied[turn].record(self._stream)


def _read(piece: _Piece, into_N: Tensor) -> None:
    """Fill host memory (uint8) with the piece's bytes."""
    tensor_files.read_into(piece.shard, piece.begin, into_N.numpy().data)
