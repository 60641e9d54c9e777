"""Rows of different lengths in one array, as Parquet's binary columns hold them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# Shape letters in this file: B rows.


@dataclass(frozen=True)
class Ragged:
    """Bytes of several rows.

    Attributes:
        flat: uint8, row after row.
        splits: int64 ``[B + 1]``; row b is ``flat[splits[b]:splits[b + 1]]``.
    """

    flat: NDArray[np.uint8]
    splits: NDArray[np.int64]

    def column(self) -> pa.Array:
        """An Arrow array over the same bytes.

        Raises:
            ValueError: over 2 GiB.
        """
        if self.splits[-1] >= 2**31:
            raise ValueError(f"{self.splits[-1]} bytes in one column; at most 2 GiB")
        offsets = pa.py_buffer(self.splits.astype(np.int32))
        data = pa.py_buffer(np.ascontiguousarray(self.flat))
        return pa.Array.from_buffers(pa.binary(), len(self.splits) - 1, [None, offsets, data])

    @classmethod
    def of(cls, column: pa.Array) -> Ragged:
        """A view of a binary Arrow array."""
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
        splits = ends.astype(np.int64)
        flat = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        return cls(flat[splits[0] : splits[-1]], splits - splits[0])


def chosen(where: NDArray[np.bool_], splits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Splits of what is left of every row."""
    counts = [np.count_nonzero(where[start:stop]) for start, stop in pairwise(splits)]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
