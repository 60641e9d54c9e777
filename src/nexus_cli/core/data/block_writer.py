"""Packed sequences as three streams of bytes, in memory or in files, with their hash."""

from __future__ import annotations

import hashlib
import io
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nexus_cli.core.data.blocks import PackedBlocks
from nexus_cli.core.data.packing import Block

# Shape letters in this file: N blocks, S tokens a block.

STREAMS = {"input_ids": "<i4", "position_ids": "<i4", "loss_mask": "|b1"}


class BlockWriter:
    """Takes blocks one source after the other; a set may be larger than memory if it has a folder.

    Attributes:
        seq_len: tokens a block.
        pad_id: what fills up a block.
        counts: blocks of each source so far.
    """

    def __init__(self, seq_len: int, pad_id: int, folder: Path | None) -> None:
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.counts: list[int] = []
        self._folder = folder
        self._stack = ExitStack()
        self._streams: dict[str, IO[bytes]] = {}
        self._hashes = {name: hashlib.sha256() for name in STREAMS}
        for name in STREAMS:
            self._streams[name] = self._stack.enter_context(
                io.BytesIO() if folder is None else (folder / name).open("wb")
            )

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def start_source(self) -> None:
        """What follows is of the next source."""
        self.counts.append(0)

    def add(self, block: Block) -> None:
        """Append one block to the current source."""
        for name, kind in STREAMS.items():
            data = getattr(block, name).astype(kind).tobytes()
            self._streams[name].write(data)
            self._hashes[name].update(data)
        self.counts[-1] += 1

    def hashes(self) -> dict[str, str]:
        """SHA-256 (hex) of each stream."""
        return {name: hashed.hexdigest() for name, hashed in self._hashes.items()}

    def blocks_in_memory(self) -> PackedBlocks:
        """The blocks of a writer without a folder."""
        arrays = {}
        for name, kind in STREAMS.items():
            stream = self._streams[name]
            stream.seek(0)
            arrays[name] = np.frombuffer(stream.read(), dtype=kind)
        return make_blocks(arrays, self.counts, self.seq_len)


def map_blocks(folder: Path, counts: list[int], seq_len: int) -> PackedBlocks:
    """Map the files of a writer into memory, read-only.

    Raises:
        ValueError: a file has another size than the counts say.
        OSError: a file is not there.
    """
    expected = sum(counts) * seq_len
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind in STREAMS.items():
        arrays[name] = np.memmap(folder / name, dtype=kind, mode="r")
        if len(arrays[name]) != expected:
            raise ValueError(f"{name}: {len(arrays[name])} values, not {expected}")
    return make_blocks(arrays, counts, seq_len)


def make_blocks(arrays: dict[str, NDArray[Any]], counts: list[int], seq_len: int) -> PackedBlocks:
    """Give flat streams their shape."""
    source_N = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return PackedBlocks(
        input_ids_NS=arrays["input_ids"].reshape(-1, seq_len),
        position_ids_NS=arrays["position_ids"].reshape(-1, seq_len),
        loss_mask_NS=arrays["loss_mask"].reshape(-1, seq_len),
        source_N=source_N,
        num_sources=len(counts),
    )
