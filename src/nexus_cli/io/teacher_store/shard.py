"""One Parquet shard of a teacher store."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from threading import Lock
from typing import IO, Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nexus_cli.errors import ArtifactError
from nexus_cli.io.location import Location, reading

Compression = Literal["zstd", "snappy", "gzip", "none"]

GROUP_TOKENS: Final = 4096  # read together: few, so that any order of reading is cheap
_ZSTD_LEVEL: Final = 1  # entropy is all there is to code: higher levels find false matches
_CACHED_GROUPS: Final = 4  # a shard: rows in the stored order; in another, none is read twice
_DAMAGE: Final = re.compile(r"CRC checksum|thrift|end of stream|[Cc]orrupt|[Pp]arquet file")


def rows_per_group(seq_len: int) -> int:
    """Rows of a row group."""
    return max(1, GROUP_TOKENS // seq_len)


def write_shard(
    sink: IO[bytes] | pa.NativeFile,
    tables: Sequence[pa.Table],
    *,
    seq_len: int,
    compression: Compression,
    metadata: Mapping[str, str],
) -> None:
    """Write the rows of all ``tables``; every page carries a checksum."""
    table = pa.concat_tables(tables)
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression=compression,
        compression_level=_ZSTD_LEVEL if compression == "zstd" else None,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,  # and with it would go metadata of the table
    ) as writer:
        writer.write_table(table, row_group_size=rows_per_group(seq_len))
        writer.add_key_value_metadata(dict(metadata))


def read_metadata(source: Any) -> tuple[int, dict[str, str]]:
    """Number of rows and the metadata that :func:`write_shard` was given, from the footer alone.

    Raises:
        ArtifactError: this is no Parquet file, or it is truncated.
    """
    try:
        footer = pq.read_metadata(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(source) from error
    stored = footer.metadata or {}
    return footer.num_rows, {key.decode(): value.decode() for key, value in stored.items()}


class ShardReader:
    """Gives rows of one shard as they are stored. Row groups are cached within bounds."""

    def __init__(self, file: Location, *, seq_len: int) -> None:
        """Open ``file``; its contents are read later.

        Raises:
            ArtifactError: this is no Parquet file, or it is truncated.
            ResourceError: it cannot be read.
        """
        self._location = file
        self._per_group = rows_per_group(seq_len)
        with _intact(file):
            # Of a remote file, one request fetches all columns of a row group.
            self._file = pq.ParquetFile(
                file.open(), pre_buffer=file.local is None, page_checksum_verification=True
            )
        self._one_at_a_time = Lock()  # Arrow's reader keeps state between the calls
        self._group = lru_cache(_CACHED_GROUPS)(self._read_group)

    def row(self, place: int) -> pa.Table:
        """One row, as :class:`~nexus_cli.io.teacher_store.columns.Codec` reads it.

        Raises:
            ArtifactError: the contents are damaged.
            ResourceError: they cannot be read.
        """
        return self._group(self.group_of(place)).slice(place % self._per_group, 1)

    def group_of(self, place: int) -> int:
        """The row group that a row lies in."""
        return place // self._per_group

    def fetch(self, group: int) -> None:
        """Read a row group, so that its rows are there."""
        self._group(group)

    def verify(self) -> None:
        """Read everything once, which checks every page.

        Raises:
            ArtifactError: the contents are damaged.
            ResourceError: they cannot be read.
        """
        for group in range(self._file.num_row_groups):
            self._read_group(group)

    def _read_group(self, group: int) -> pa.Table:
        with self._one_at_a_time, _intact(self._location):
            return self._file.read_row_group(group, use_threads=False)


@contextmanager
def _intact(file: Location) -> Iterator[None]:
    """Tell a damaged file from a server that does not answer; Arrow raises OSError of both."""
    try:
        with reading(file) if file.local is None else nullcontext():
            try:
                yield
            except OSError as error:
                if _DAMAGE.search(str(error)):
                    raise damaged(file.shown) from error
                raise
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(file.shown) from error


def damaged(shown: object) -> ArtifactError:
    """What to say of a file whose contents cannot be right."""
    return ArtifactError(
        f"{shown} is damaged or no shard of a teacher store",
        hint="delete it and run nexus precompute again; the other shards are kept",
    )
