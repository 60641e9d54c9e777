"""Rows of Parquet files and of the Arrow files that ``save_to_disk`` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nexus_cli.core.data.errors import bad_file
from nexus_cli.core.data.text_files import LFS_HINT, LFS_POINTER

ROWS = 128  # rows turned into Python objects at once


def read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the row number, counted from 1, and the row.

    Raises:
        BadFileError: the file is empty or no Parquet file.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield from _rows(path, file.iter_batches(batch_size=ROWS))
    except (pa.ArrowException, OSError) as error:
        raise bad_file(path, None, f"not a readable Parquet file: {error}", _hint(path)) from error


def read_arrow(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the row number, counted from 1, and the row, of an Arrow stream or file.

    Raises:
        BadFileError: the file is empty or no Arrow file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            yield from _rows(path, _batches(source))
    except (pa.ArrowException, OSError) as error:
        raise bad_file(path, None, f"not a readable Arrow file: {error}", _hint(path)) from error


def without_nulls(value: Any) -> Any:
    """Drop null fields of structs: a column holds every key that any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:
        stream = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        file = pa.ipc.open_file(source)
        yield from (file.get_batch(index) for index in range(file.num_record_batches))
    else:
        yield from stream


def _rows(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, Any]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            for row in batch.slice(start, ROWS).to_pylist():
                number += 1
                yield number, {key: without_nulls(value) for key, value in row.items()}
    if number == 0:
        raise bad_file(path, None, "the file holds no rows")


def _hint(path: Path) -> str | None:
    with path.open("rb") as file:
        return LFS_HINT if file.read(64).startswith(LFS_POINTER.encode()) else None
