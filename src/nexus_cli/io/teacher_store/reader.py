"""Reads a finished teacher store: any rows, in any order, from any filesystem."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io.hashing import sha256_bytes
from nexus_cli.io.location import Location
from nexus_cli.io.teacher_store.columns import Codec
from nexus_cli.io.teacher_store.id_planes import VocabularyRanks
from nexus_cli.io.teacher_store.manifest import (
    FILENAME,
    RANKS,
    SHARDS,
    StoreManifest,
    read_manifest,
)
from nexus_cli.io.teacher_store.quantise import TEMPERATURES
from nexus_cli.io.teacher_store.rows import StoreRows
from nexus_cli.io.teacher_store.shard import ShardReader, damaged

_NAMED: Final = 3  # temperatures in a message
_OPEN_SHARDS: Final = 32
_REMEMBERED_BYTES: Final = 256 * 2**20
_REMOTE_READS: Final = 8  # at once: a request takes tens of milliseconds, whatever its size


class _Recent:
    """The last decoded batches, the newest always and others within bounds; for any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[int, ...], StoreRows] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, key: tuple[int, ...]) -> StoreRows | None:
        with self._lock:
            return self._held.get(key)

    def put(self, key: tuple[int, ...], rows: StoreRows) -> None:
        with self._lock:
            if key in self._held:
                return
            self._held[key] = rows
            self._bytes += rows.nbytes
            while self._bytes > self._limit and len(self._held) > 1:
                _, oldest = self._held.popitem(last=False)
                self._bytes -= oldest.nbytes


class TeacherStore:
    """A finished store, whole or partial."""

    def __init__(self, folder: Location, manifest: StoreManifest, ranks: VocabularyRanks) -> None:
        """Use :func:`open_store`, which checks what it opens."""
        self.folder = folder
        self.manifest = manifest
        self.plan = manifest.plan
        self.ranks = ranks
        self._codec = Codec(manifest.plan.layout, ranks)
        self._first_rows = manifest.first_rows
        self._verified: set[int] = set()
        self._shard = lru_cache(_OPEN_SHARDS)(self._open_shard)
        self._recent = _Recent(_REMEMBERED_BYTES)

    def __len__(self) -> int:
        return self._first_rows[-1]

    @property
    def dense(self) -> bool:
        """Whether positions keep the whole vocabulary exactly, and so have no tail."""
        plan = self.plan
        return plan.top_k == plan.vocab_size and plan.top_p >= 1 and plan.values == "float32"

    def rows(self, index_B: Sequence[int] | NDArray[np.int64]) -> StoreRows:
        """The rows ``index_B``, in that order; repeats are fine.

        What was read last is remembered: a step asks for its text, and then for its teacher.

        Raises:
            ArtifactError: a shard is damaged. On a local disk its hash is checked when it is
                first read, elsewhere the checksum of every page that is read.
            IndexError: there is no such row.
        """
        index = np.asarray(index_B, dtype=np.int64).tolist()
        for row in index:
            if not 0 <= row < len(self):
                raise IndexError(f"row {row} of a teacher store with {len(self)} rows")
        rows = self._recent.get(key := tuple(index))
        if rows is None:
            rows = self._decoded(index)
            self._recent.put(key, rows)
        return rows

    def _decoded(self, index: list[int]) -> StoreRows:
        if self.folder.local is None:
            self._fetch(index)
        tables = [self._row(row) for row in index]
        try:
            return self._codec.decode(pa.concat_tables(tables))
        except (LookupError, ValueError, pa.ArrowInvalid) as error:
            shards = sorted({self._place(row)[0] for row in index})
            names = ", ".join(self.manifest.shards[shard].file for shard in shards)
            raise damaged(f"{(self.folder / SHARDS).shown}: {names}") from error

    def _fetch(self, index: list[int]) -> None:
        """Ask for several row groups at once, and for each once."""
        places = [self._place(row) for row in index]
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            shards = sorted({shard for shard, _ in places})
            opened = dict(zip(shards, pool.map(self._shard, shards), strict=True))
            groups = {(shard, opened[shard].group_of(place)) for shard, place in places}
            list(pool.map(lambda at: opened[at[0]].fetch(at[1]), sorted(groups)))

    def verify(self) -> list[str]:
        """Names of the shards whose contents are not what the manifest says; reads all bytes."""
        return [
            record.file
            for record in self.manifest.shards
            if (self.folder / SHARDS / record.file).sha256() != record.sha256
        ]

    def require_temperatures(self, temperatures: Iterable[float]) -> None:
        """Refuse a run that needs the teacher at another temperature than 1, 2 or 4.

        The mass of the tail at another temperature does not follow from these.

        Raises:
            ConfigError: a temperature is none of them, and positions have a tail.
        """
        if self.dense:
            return
        if others := sorted({value for value in temperatures if value not in TEMPERATURES}):
            named = " or ".join(f"{value:g}" for value in others[:_NAMED])
            more = " or others" if len(others) > _NAMED else ""
            raise ConfigError(
                f"{self.folder.shown} holds the teacher at the temperatures 1, 2 and 4, "
                f"not at {named}{more}",
                hint="keep the temperature at one of these, or use nexus train with the teacher "
                "in memory",
            )

    def _place(self, row: int) -> tuple[int, int]:
        shard = bisect_right(self._first_rows, row) - 1
        return shard, row - self._first_rows[shard]

    def _row(self, row: int) -> pa.Table:
        shard, place = self._place(row)
        return self._shard(shard).row(place)

    def _open_shard(self, shard: int) -> ShardReader:
        record = self.manifest.shards[shard]
        file = self.folder / SHARDS / record.file
        if self.folder.local is not None and shard not in self._verified:
            if not file.is_file() or file.sha256() != record.sha256:
                raise ArtifactError(
                    f"{file.shown} is not the shard that {FILENAME} lists",
                    hint="delete it and run the same nexus precompute again",
                )
            self._verified.add(shard)
        return ShardReader(file, seq_len=self.plan.seq_len)


def open_store(
    folder: Location,
    *,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    teacher: str | None = None,
) -> TeacherStore:
    """Open a finished store, partial or whole.

    Sizes are checked now, contents when they are read.

    Args:
        folder: where ``store.json`` lies.
        vocab_size: of the student, to be compared if given.
        tokenizer: hash of the student's tokenizer file, likewise.
        teacher: fingerprint of the expected teacher, likewise.

    Raises:
        ArtifactError: unfinished, truncated, of another format, or of another model.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise _no_store(folder)
    sizes = (folder / SHARDS).sizes()
    for record in manifest.shards:
        size = sizes.get(record.file)
        if size is None:
            raise ArtifactError(f"{folder.shown} lacks the shard {record.file!r}")
        if size != record.bytes:
            name = (folder / SHARDS / record.file).shown
            raise ArtifactError(f"{name} is truncated: {size} of {record.bytes} bytes")
    plan = manifest.plan
    _require_same(folder, "vocabulary size", plan.vocab_size, vocab_size)
    _require_same(folder, "tokenizer", plan.tokenizer, tokenizer)
    _require_same(folder, f"teacher ({plan.teacher_name})", plan.teacher, teacher)
    return TeacherStore(folder, manifest, read_ranks(folder, plan.vocab_ranks))


def read_ranks(folder: Location, sha256: str) -> VocabularyRanks:
    """The table of ranks, whose hash must be ``sha256``.

    Raises:
        ArtifactError: it is missing or another one.
    """
    file = folder / RANKS
    if not file.is_file():
        raise ArtifactError(f"{folder.shown} lacks {RANKS}")
    data = file.read_bytes()
    if sha256_bytes(data) != sha256:
        raise ArtifactError(f"{file.shown} is not the table that {FILENAME} lists")
    return VocabularyRanks(np.load(io.BytesIO(data), allow_pickle=False))


def _no_store(folder: Location) -> ArtifactError:
    unfinished = (folder / SHARDS).is_dir()
    state = "an unfinished teacher store" if unfinished else "no teacher store"
    return ArtifactError(
        f"{folder.shown} is {state}: it has no {FILENAME}",
        hint="run the same nexus precompute again; it continues after the last whole shard"
        if unfinished
        else "nexus precompute writes one",
    )


def _require_same(folder: Location, what: str, stored: object, expected: object) -> None:
    if expected is not None and stored != expected:
        short = [str(value)[:16] for value in (stored, expected)]
        raise ArtifactError(
            f"{folder.shown} was made with another {what}: {short[0]}, not {short[1]}",
            hint="run nexus precompute with the model that the student was made from",
        )
