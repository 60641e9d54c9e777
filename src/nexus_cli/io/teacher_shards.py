"""One Parquet shard of a teacher store: how rows become columns, and back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nexus_cli.errors import ArtifactError

# Shape letters in this file: B rows (sequences), S positions, K kept entries.

Precision = Literal["float16", "float32"]
Compression = Literal["zstd", "snappy", "gzip", "none"]

ROW_GROUP = 4  # rows that are decoded together: small, so that any order of reading is cheap


@dataclass(frozen=True)
class StoreRows:
    """Sequences and what the teacher says of them; position t predicts token t + 1.

    Only positions whose next token is a target hold a distribution. The others have no used
    entry, and NaN as their tail, so that a loss that counts them by mistake is not a number.

    Attributes:
        input_ids_BS: int32.
        position_ids_BS: int32, 0 at every document start.
        loss_mask_BS: bool; True where the token at this position is a target.
        source_B: int16 index of the data source.
        ids_BSK: int32 token ids, likeliest first.
        logprobs_BSK: float32 log-probabilities at T = 1; ``-inf`` where not used.
        tail_BS: float32 log of the mass of all other tokens.
        nll_BS: float32 negative log-probability of the next token; 0 where not held.
    """

    input_ids_BS: NDArray[np.int32]
    position_ids_BS: NDArray[np.int32]
    loss_mask_BS: NDArray[np.bool_]
    source_B: NDArray[np.int16]
    ids_BSK: NDArray[np.int32]
    logprobs_BSK: NDArray[np.float32]
    tail_BS: NDArray[np.float32]
    nll_BS: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.source_B)

    def take(self, index: slice | NDArray[np.int64]) -> StoreRows:
        """Some of the rows, in the order of ``index``."""
        return StoreRows(*(getattr(self, field.name)[index] for field in fields(self)))


def concatenate(parts: list[StoreRows]) -> StoreRows:
    """The rows of all ``parts``, in order."""
    names = [field.name for field in fields(StoreRows)]
    return StoreRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def encode(
    rows: StoreRows,
    *,
    precision: Precision,
    compression: Compression,
    metadata: Mapping[str, str],
) -> bytes:
    """The bytes of a Parquet file with one row a sequence, arrays as little-endian blobs."""
    columns = {
        "source": pa.array(rows.source_B, pa.int16()),
        "input_ids": _blobs(rows.input_ids_BS, "<i4"),
        "position_ids": _blobs(rows.position_ids_BS, "<i4"),
        "loss_mask": _blobs(np.packbits(rows.loss_mask_BS, axis=1), "u1"),
        "topk_ids": _blobs(rows.ids_BSK, "<i4"),
        "topk_logprobs": _blobs(rows.logprobs_BSK, "<f2" if precision == "float16" else "<f4"),
        "tail_logprob": _blobs(rows.tail_BS, "<f4"),
        "nll": _blobs(rows.nll_BS, "<f4"),
    }
    table = pa.table(columns).replace_schema_metadata(dict(metadata))
    file = io.BytesIO()
    pq.write_table(
        table,
        file,
        compression=compression,
        row_group_size=ROW_GROUP,
        use_dictionary=False,
        write_statistics=False,
    )
    return file.getvalue()


def read_metadata(path: Path) -> tuple[int, dict[str, str]]:
    """Number of rows and the metadata that :func:`encode` was given, from the footer alone.

    Raises:
        ArtifactError: this is no Parquet file, or it is truncated.
    """
    try:
        footer = pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path) from error
    stored = footer.metadata or {}
    return footer.num_rows, {key.decode(): value.decode() for key, value in stored.items()}


class ShardReader:
    """Decodes row groups of one shard."""

    def __init__(self, path: Path, *, seq_len: int, top_k: int, precision: Precision) -> None:
        """Open ``path``; its contents are read later.

        Raises:
            ArtifactError: this is no Parquet file, or it is truncated.
        """
        self._path = path
        self._shape = (seq_len, top_k)
        self._precision = precision
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise _damaged(path) from error

    def read_group(self, group: int) -> StoreRows:
        """Rows ``[group * ROW_GROUP, (group + 1) * ROW_GROUP)`` of the shard.

        Raises:
            ArtifactError: the contents are not what the format says.
        """
        seq_len, top_k = self._shape
        try:
            table = self._file.read_row_group(group, use_threads=False)
            float_type = "<f2" if self._precision == "float16" else "<f4"
            mask_BX = _arrays(table, "loss_mask", "u1", -1)
            logprobs_BSK = _arrays(table, "topk_logprobs", float_type, seq_len, top_k)
            tail_BS = _arrays(table, "tail_logprob", "<f4", seq_len).astype(np.float32)
            logprobs_BSK = logprobs_BSK.astype(np.float32)
            if self._precision == "float16":
                logprobs_BSK, tail_BS = _sum_to_one(logprobs_BSK, tail_BS)
            return StoreRows(
                input_ids_BS=_arrays(table, "input_ids", "<i4", seq_len),
                position_ids_BS=_arrays(table, "position_ids", "<i4", seq_len),
                loss_mask_BS=np.unpackbits(mask_BX, axis=1, count=seq_len).astype(np.bool_),
                source_B=table.column("source").to_numpy().astype(np.int16),
                ids_BSK=_arrays(table, "topk_ids", "<i4", seq_len, top_k),
                logprobs_BSK=logprobs_BSK,
                tail_BS=tail_BS,
                nll_BS=_arrays(table, "nll", "<f4", seq_len),
            )
        except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
            raise _damaged(self._path) from error


def _blobs(values_BX: NDArray[Any], dtype: str) -> pa.Array:
    flat = np.ascontiguousarray(values_BX, dtype=dtype)
    return pa.array([row.tobytes() for row in flat], pa.binary())


def _arrays(table: pa.Table, name: str, dtype: str, *shape: int) -> NDArray[Any]:
    blobs = [np.frombuffer(value.as_buffer(), dtype=dtype) for value in table.column(name)]
    return np.stack(blobs).reshape(len(blobs), *shape)


def _sum_to_one(
    logprobs_BSK: NDArray[np.float32], tail_BS: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Take rounding errors out of the K + 1 probabilities, all of them together.

    The tail takes part: the kept entries are never made to sum to one by themselves.
    """
    total_BS = np.exp(logprobs_BSK).sum(-1) + np.exp(tail_BS)
    held_BS = np.isfinite(total_BS)
    excess_BS = np.log(total_BS, out=np.zeros_like(total_BS), where=held_BS)
    return logprobs_BSK - excess_BS[..., None], tail_BS - excess_BS


def _damaged(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged or no shard of a teacher store",
        hint="delete it and run nexus precompute again; the other shards are kept",
    )
