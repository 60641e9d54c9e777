"""Writes a teacher store shard by shard, so that a killed run continues after the last one."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from nexus_cli.errors import ArtifactError, ResourceError, WorkspaceError
from nexus_cli.io.atomic import write_atomic
from nexus_cli.io.hashing import sha256_bytes, sha256_file
from nexus_cli.io.location import locate
from nexus_cli.io.teacher_store.columns import Codec
from nexus_cli.io.teacher_store.id_planes import VocabularyRanks
from nexus_cli.io.teacher_store.manifest import (
    FILENAME,
    RANKS,
    SHARDS,
    ShardRecord,
    StoreManifest,
    StorePlan,
)
from nexus_cli.io.teacher_store.rows import StoreRows
from nexus_cli.io.teacher_store.shard import ShardReader, read_metadata, write_shard

_PLAN: Final = "nexus.plan"
_RECORD: Final = "nexus.record"
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_BALLAST: Final = ".room-for-store.json"
_WRITING: Final = ".writing"  # its absence tells every rank that the disk is full


class DiskFullError(ResourceError):
    """The disk had no room for a shard; those before it are whole."""


class StoreWriter:
    """One rank's hand in a store: any rank may write any shard, but no two the same."""

    def __init__(self, path: Path, plan: StorePlan, ranks: VocabularyRanks) -> None:
        """Plan to write to the folder ``path``; nothing is touched yet."""
        self.path = path
        self.plan = plan
        self._ranks = ranks
        self._codec = Codec(plan.layout, ranks)
        self._shards = path / SHARDS
        self._tables: list[pa.Table] = []
        self._entries = 0
        self._targets = 0
        self._nll_sum = 0.0

    def prepare(self, *, force: bool = False) -> None:
        """Make the folder ready, on one rank and before any shard is written.

        Shards of the same plan are kept, so that a line with ``force`` goes on too when it was
        killed; only a store that is finished is then made again.

        Args:
            force: remove a finished store, and shards of another plan.

        Raises:
            WorkspaceError: the folder holds shards of another plan.
            DiskFullError: there is no room even for the table of ranks.
        """
        if force and self._finished():
            (self.path / FILENAME).unlink()  # first: what it lists must not change under it
            shutil.rmtree(self._shards, ignore_errors=True)
        with _disk_full(self.path):
            self._shards.mkdir(parents=True, exist_ok=True)
        for temporary in (*self.path.glob(".*.tmp"), *self._shards.glob(".*.tmp")):
            temporary.unlink()
        self._require_same_plan(force=force)
        with _disk_full(self.path):
            write_atomic(self.path / RANKS, ranks_file(self._ranks))
            # As much as the manifest will take, so that a full disk cannot keep it out.
            (self.path / _BALLAST).write_bytes(bytes(4096 + 512 * self.plan.num_shards))
            (self.path / _WRITING).touch()

    def _finished(self) -> bool:
        """Whether there is a manifest, and of more than the disk had room for."""
        manifest = self.path / FILENAME
        if not manifest.is_file():
            return False
        try:
            return bool(json.loads(manifest.read_bytes()).get("ended_early") != "disk")
        except (ValueError, AttributeError):
            return True  # damaged: of no use to anybody

    def _require_same_plan(self, *, force: bool) -> None:
        others = {}
        for shard in sorted(self._shards.glob("*.parquet")):
            found = _plan_of(shard)
            if found is None:
                others[shard] = "is none of nexus"
            elif differing := self.plan.differing(found):
                others[shard] = f"differs in {', '.join(differing)}"
        if not others:
            return
        if not force:
            shard, reason = next(iter(others.items()))
            raise WorkspaceError(
                f"{shard} belongs to another run: it {reason}",
                hint="use --force to replace the store, or another --output-dir",
            )
        (self.path / FILENAME).unlink(missing_ok=True)
        for shard in others:
            shard.unlink()

    def find(self, shard: int) -> ShardRecord | None:
        """The record of a shard that is there already, whole; a damaged one is removed."""
        path = self._path(shard)
        if not path.is_file():
            return None
        try:
            ShardReader(locate(path), seq_len=self.plan.seq_len).verify()
        except ArtifactError:
            path.unlink()
            return None
        _, metadata = read_metadata(path)
        return ShardRecord(
            **json.loads(metadata[_RECORD]),
            file=path.name,
            sha256=sha256_file(path),
            bytes=path.stat().st_size,
        )

    def add(self, span: range, rows: StoreRows) -> None:
        """Code the next rows of a shard; :meth:`close` writes them."""
        self._tables.append(self._codec.encode(rows, np.arange(span.start, span.stop)))
        self._entries += int(np.isfinite(rows.kept.logprobs_MK).sum())
        self._targets += len(rows.kept)
        self._nll_sum += float(rows.kept.nll_M.sum(dtype=np.float64))

    def close(self, shard: int) -> ShardRecord:
        """Write the rows since the last call as one shard, all of it or nothing.

        Raises:
            DiskFullError: the disk is full. The shards written before stay.
            ValueError: these are not as many rows as the shard has.
        """
        num_rows, expected = sum(map(len, self._tables)), len(self.plan.shard_rows(shard))
        if num_rows != expected:
            raise ValueError(f"shard {shard} takes {expected} rows, not {num_rows}")
        counts = {
            "num_rows": num_rows,
            "num_targets": self._targets,
            "num_entries": self._entries,
            "nll_sum": self._nll_sum,
        }
        file = io.BytesIO()
        write_shard(
            file,
            self._tables,
            seq_len=self.plan.seq_len,
            compression=self.plan.compression,
            metadata={_PLAN: self.plan.model_dump_json(), _RECORD: json.dumps(counts)},
        )
        self._tables, self._entries, self._targets, self._nll_sum = [], 0, 0, 0.0
        data, path = file.getvalue(), self._path(shard)
        try:
            with _disk_full(path, len(data)):
                write_atomic(path, data)
        except DiskFullError:
            (self.path / _WRITING).unlink(missing_ok=True)
            raise
        return ShardRecord(**counts, file=path.name, sha256=sha256_bytes(data), bytes=len(data))

    @property
    def stopped(self) -> bool:
        """Whether some rank found the disk full."""
        return not (self.path / _WRITING).exists()

    def finish(self, records: Sequence[ShardRecord]) -> StoreManifest:
        """Write ``store.json``, on one rank and after all ranks; the records' order is free.

        Shards may be missing, where the disk was full: the store then is what is there.

        Raises:
            DiskFullError: there is no room for it after all.
        """
        shards = tuple(sorted(records, key=lambda record: record.file))
        plan = self.plan
        ended_early: Literal["text", "disk"] | None = None
        if len(shards) < plan.num_shards:
            ended_early = "disk"
        elif plan.num_rows < plan.requested_steps * plan.batch_size:
            ended_early = "text"
        manifest = StoreManifest(plan=plan, ended_early=ended_early, shards=shards)
        (self.path / _BALLAST).unlink(missing_ok=True)
        with _disk_full(self.path / FILENAME):
            write_atomic(self.path / FILENAME, manifest.model_dump_json(indent=2).encode())
        (self.path / _WRITING).unlink(missing_ok=True)
        return manifest

    def _path(self, shard: int) -> Path:
        return self._shards / f"{shard:05d}.parquet"


def ranks_file(ranks: VocabularyRanks) -> bytes:
    """The bytes of ``vocab_rank.npy``."""
    file = io.BytesIO()
    np.save(file, ranks.id_V.astype("<i4"), allow_pickle=False)
    return file.getvalue()


@contextmanager
def _disk_full(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn the system's error into ours."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        needed = "" if size is None else f" ({size / 2**20:.1f} MiB)"
        raise DiskFullError(
            f"no space left for {path}{needed}; the shards before it are whole",
            hint="free some space and run the same command again; it continues there",
        ) from error


def _plan_of(shard: Path) -> StorePlan | None:
    _, metadata = read_metadata(shard)
    try:
        return StorePlan.model_validate_json(metadata.get(_PLAN, ""))
    except ValidationError:
        return None
