"""``nexus.teacher_store/1``: a teacher's top-K view of packed text, read in any order.

A store is a folder with ``store.json``, written last, and ``shards/NNNNN.parquet``. Shard i
holds rows ``[i * rows_per_shard, (i + 1) * rows_per_shard)``, so that neither the number of
ranks that wrote it nor a kill on the way shows in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io.hashing import sha256_file, sha256_json
from nexus_cli.io.model_dir import read_json
from nexus_cli.io.teacher_shards import (
    ROW_GROUP,
    Compression,
    Precision,
    ShardReader,
    StoreRows,
    concatenate,
)

FORMAT: Final = "nexus.teacher_store/1"
FILENAME = "store.json"
SHARDS = "shards"

_OPEN_SHARDS = 16
_CACHED_GROUPS = 64


class StorePlan(BaseModel):
    """What decides the rows of a store; shards of different plans are never mixed.

    Attributes:
        teacher: fingerprint of the teacher's weights.
        teacher_name: what the user called it.
        tokenizer: hash of the tokenizer file.
        data_digest: hash of the text, packed and in the order stored.
        sources: names of the data sources, by index.
        vocab_size: of the teacher's head.
        top_k: kept entries a position.
        temperature: always 1.
        precision: of the kept log-probabilities.
        dtype: in which the teacher ran.
        compression: of the Parquet columns.
        seq_len: tokens a row.
        batch_size: rows a step; the teacher saw them together.
        requested_steps: steps that were asked for.
        num_rows: rows in the store; fewer than asked for if the text ran out.
        rows_per_shard: every shard but the last has so many.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    teacher_name: str
    tokenizer: str
    data_digest: str
    sources: tuple[str, ...]
    vocab_size: int
    top_k: int
    temperature: float = Field(1.0, ge=1, le=1)
    precision: Precision
    dtype: str
    compression: Compression
    seq_len: int
    batch_size: int
    requested_steps: int
    num_rows: int
    rows_per_shard: int

    @property
    def num_shards(self) -> int:
        """How many shards the rows make."""
        return -(-self.num_rows // self.rows_per_shard)

    @property
    def actual_steps(self) -> int:
        """Whole batches in the store."""
        return self.num_rows // self.batch_size

    @property
    def complete(self) -> bool:
        """Whether the text lasted for all the steps that were asked for."""
        return self.num_rows == self.requested_steps * self.batch_size

    def shard_rows(self, shard: int) -> range:
        """The rows of one shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def differing(self, other: StorePlan) -> list[str]:
        """Names of the fields in which ``other`` makes another store."""
        names = StorePlan.model_fields.keys() - {"teacher_name"}
        return sorted(name for name in names if getattr(self, name) != getattr(other, name))


class ShardRecord(BaseModel):
    """One shard as ``store.json`` lists it.

    Attributes:
        file: name in the folder of shards.
        num_rows: sequences.
        num_targets: positions that hold a distribution.
        nll_sum: the teacher's negative log-likelihood of the targets, summed, in nats.
        sha256: of the file.
        bytes: of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    num_rows: int
    num_targets: int
    nll_sum: float
    sha256: str
    bytes: int


class StoreManifest(BaseModel):
    """``store.json``: the plan, what came of it, and the shards.

    Attributes:
        format: of the store.
        plan: what decided its rows.
        complete: whether the text lasted for all the steps that were asked for.
        actual_steps: whole batches in the store.
        num_targets: positions that hold a distribution.
        teacher_nll: mean over them, in nats; its exponential is the teacher's perplexity.
        shards: in the order of their rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["nexus.teacher_store/1"] = FORMAT
    plan: StorePlan
    complete: bool
    actual_steps: int
    num_targets: int
    teacher_nll: float | None
    shards: tuple[ShardRecord, ...]

    @property
    def digest(self) -> str:
        """Identity of the contents."""
        return sha256_json([shard.sha256 for shard in self.shards])


class TeacherStore:
    """A finished store. Reads rows in any order; decoded rows are cached within bounds."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        """Use :func:`open_store`, which checks what it opens."""
        self.path = path
        self.manifest = manifest
        self.plan = manifest.plan
        self._verified: set[int] = set()
        self._shard = lru_cache(_OPEN_SHARDS)(self._open_shard)
        self._group = lru_cache(_CACHED_GROUPS)(self._read_group)

    def __len__(self) -> int:
        return self.plan.num_rows

    def rows(self, index_B: Sequence[int] | NDArray[np.int64]) -> StoreRows:
        """The rows ``index_B``, in that order; repeats are fine.

        Raises:
            ArtifactError: a shard is damaged. Its hash is checked when it is first read.
            IndexError: there is no such row.
        """
        parts = []
        for row in np.asarray(index_B, dtype=np.int64).tolist():
            if not 0 <= row < len(self):
                raise IndexError(f"row {row} of a teacher store with {len(self)} rows")
            shard, place = divmod(row, self.plan.rows_per_shard)
            group, offset = divmod(place, ROW_GROUP)
            parts.append(self._group(shard, group).take(slice(offset, offset + 1)))
        return concatenate(parts)

    def require_temperatures(self, temperatures: Iterable[float]) -> None:
        """Refuse a run that needs another temperature than the stored one.

        The tail's mass at another temperature does not follow from the one at T = 1.

        Raises:
            ConfigError: a temperature is not 1.
        """
        if others := [f"{value:g}" for value in temperatures if value != self.plan.temperature]:
            raise ConfigError(
                f"{self.path} holds the teacher at temperature 1, not at {' or '.join(others)}",
                hint="set the temperature to 1, or use nexus train with the teacher in memory",
            )

    def _open_shard(self, shard: int) -> ShardReader:
        record = self.manifest.shards[shard]
        path = self.path / SHARDS / record.file
        if shard not in self._verified:
            if not path.is_file() or sha256_file(path) != record.sha256:
                raise ArtifactError(
                    f"{path} is not the shard that {FILENAME} lists",
                    hint="delete it and run the same nexus precompute again",
                )
            self._verified.add(shard)
        plan = self.plan
        return ShardReader(path, seq_len=plan.seq_len, top_k=plan.top_k, precision=plan.precision)

    def _read_group(self, shard: int, group: int) -> StoreRows:
        return self._shard(shard).read_group(group)


def open_store(
    path: Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    teacher: str | None = None,
) -> TeacherStore:
    """Open a finished store, partial or complete.

    Sizes are checked now, contents when they are first read.

    Args:
        path: folder with ``store.json``.
        vocab_size: of the student, to be compared if given.
        tokenizer: hash of the student's tokenizer file, likewise.
        teacher: fingerprint of the expected teacher, likewise.

    Raises:
        ArtifactError: unfinished, truncated, of another format, or of another model.
    """
    manifest = read_manifest(path)
    if manifest is None:
        unfinished = (path / SHARDS).is_dir()
        state = "an unfinished teacher store" if unfinished else "no teacher store"
        raise ArtifactError(
            f"{path} is {state}: it has no {FILENAME}",
            hint="run the same nexus precompute again; it continues after the last whole shard"
            if unfinished
            else "nexus precompute writes one",
        )
    for record in manifest.shards:
        shard = path / SHARDS / record.file
        if Path(record.file).name != record.file or not shard.is_file():
            raise ArtifactError(f"{path} lacks the shard {record.file!r}")
        if shard.stat().st_size != record.bytes:
            raise ArtifactError(
                f"{shard} is truncated: {shard.stat().st_size} of {record.bytes} bytes"
            )
    plan = manifest.plan
    expected = [len(plan.shard_rows(shard)) for shard in range(plan.num_shards)]
    if expected != [record.num_rows for record in manifest.shards]:
        raise ArtifactError(f"{path / FILENAME} lists shards that do not make {plan.num_rows} rows")
    _require_same(path, "vocabulary size", plan.vocab_size, vocab_size)
    _require_same(path, "tokenizer", plan.tokenizer, tokenizer)
    _require_same(path, f"teacher ({plan.teacher_name})", plan.teacher, teacher)
    return TeacherStore(path, manifest)


def read_manifest(path: Path) -> StoreManifest | None:
    """``store.json`` of the folder, or ``None`` if there is none.

    Raises:
        ArtifactError: it is damaged, or of another format.
    """
    if not (path / FILENAME).is_file():
        return None
    document = read_json(path / FILENAME)
    if document.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has the format {document.get('format')!r}; this nexus reads {FORMAT}",
            hint="run nexus precompute again with --force",
        )
    try:
        return StoreManifest.model_validate(document)
    except ValidationError as error:
        raise ArtifactError(f"{path / FILENAME} is damaged: not a {FORMAT} file") from error


def _require_same(path: Path, what: str, stored: object, expected: object) -> None:
    if expected is not None and stored != expected:
        short = [str(value)[:16] for value in (stored, expected)]
        raise ArtifactError(
            f"{path} was made with another {what}: {short[0]}, not {short[1]}",
            hint="run nexus precompute with the model that the student was made from",
        )
