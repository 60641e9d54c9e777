"""Arrays as binary columns, and back: bits, little-endian values, planes of bytes."""

# ruff: noqa: D103 - each does in one or two lines what its name says

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nexus_cli.io.teacher_store.ragged import Ragged

# Shape letters in this file: B rows, S positions, M held positions, N entries, K of each position.

Columns = dict[str, pa.Array]


def count_type(top_k: int) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if top_k < 256 else np.uint16 if top_k < 65536 else np.uint32


def even(values_BX: NDArray[Any]) -> NDArray[np.int64]:
    """Splits of rows of one length."""
    splits: NDArray[np.int64] = np.arange(len(values_BX) + 1, dtype=np.int64) * values_BX.shape[1]
    return splits


def running(counts_X: NDArray[Any]) -> NDArray[np.int64]:
    """Sums of the first 0, 1, 2, ... counts."""
    return np.concatenate([[0], np.cumsum(counts_X, dtype=np.int64)])


def bits(mask_BS: NDArray[np.bool_]) -> pa.Array:
    packed_BX = np.packbits(mask_BS, axis=1)
    return Ragged(packed_BX.reshape(-1), even(packed_BX)).column()


def unpacked(column: pa.Array, shape: tuple[int, int]) -> NDArray[np.bool_]:
    packed_BX = Ragged.of(column).flat.reshape(shape[0], -1)
    return np.unpackbits(packed_BX, axis=1, count=shape[1]).view(np.bool_)


def starts_of(position_ids_BS: NDArray[np.int32]) -> NDArray[np.bool_]:
    starts_BS: NDArray[np.bool_] = position_ids_BS == 0
    if not np.array_equal(positions(starts_BS), position_ids_BS):
        raise ValueError("positions must start at 0 and go up by one")
    return starts_BS


def positions(starts_BS: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Distance from the last start."""
    place_S = np.arange(starts_BS.shape[1], dtype=np.int32)
    return place_S - np.maximum.accumulate(np.where(starts_BS, place_S, 0), axis=1)


def bytes_of(name: str, values_MX: NDArray[Any], splits: NDArray[np.int64]) -> Columns:
    """Little-endian values, ``splits`` counted in them."""
    values_MX = np.ascontiguousarray(values_MX)
    width = values_MX.itemsize * int(np.prod(values_MX.shape[1:]))
    little = values_MX.astype(values_MX.dtype.newbyteorder("<"), copy=False)
    return {name: Ragged(little.reshape(-1).view(np.uint8), splits * width).column()}


def values_of(column: pa.Array, dtype: type[np.generic] = np.uint8) -> NDArray[Any]:
    return Ragged.of(column).flat.view(np.dtype(dtype).newbyteorder("<"))


def two_planes(name: str, codes_M: NDArray[np.uint16], splits: NDArray[np.int64]) -> Columns:
    low, high = (codes_M & 0xFF).astype(np.uint8), (codes_M >> 8).astype(np.uint8)
    return {
        f"{name}_low": Ragged(low, splits).column(),
        f"{name}_high": Ragged(high, splits).column(),
    }


def from_two_planes(name: str, columns: Columns) -> NDArray[np.uint16]:
    low_M, high_M = (values_of(columns[f"{name}_{plane}"]) for plane in ("low", "high"))
    codes_M: NDArray[np.uint16] = high_M.astype(np.uint16) << 8 | low_M
    return codes_M


def spread(
    values_N: NDArray[Any],
    used_MK: NDArray[np.bool_] | None,
    shape: tuple[int, int],
    *,
    filler: float = 0,
) -> NDArray[Any]:
    """Entries at their places ``[M, K]``, ``filler`` where none is kept."""
    if used_MK is None:
        return values_N.reshape(shape)
    spread_MK = np.full(shape, filler, values_N.dtype)
    spread_MK[used_MK] = values_N
    return spread_MK


def one_piece(column: pa.ChunkedArray) -> pa.Array:
    """One array of a column's pieces."""
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):  # of no pieces
        return pa.array([], column.type)
    return combined
