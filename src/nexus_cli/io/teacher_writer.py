"""Writes a teacher store shard by shard, so that a killed run continues after the last one."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from nexus_cli.errors import ResourceError, WorkspaceError
from nexus_cli.io.atomic import write_atomic
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.teacher_shards import StoreRows, encode, read_metadata
from nexus_cli.io.teacher_store import (
    FILENAME,
    SHARDS,
    ShardRecord,
    StoreManifest,
    StorePlan,
)

_PLAN = "nexus.plan"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class StoreWriter:
    """One rank's hand in a store: any rank may write any shard, but no two the same."""

    def __init__(self, path: Path, plan: StorePlan) -> None:
        """Plan to write to the folder ``path``; nothing is touched yet."""
        self.path = path
        self.plan = plan
        self._shards = path / SHARDS

    def prepare(self, *, force: bool = False) -> None:
        """Make the folder ready, on one rank and before any shard is written.

        Args:
            force: remove shards that are there; else those of the same plan are kept.

        Raises:
            WorkspaceError: the folder holds shards of another plan.
        """
        if force:
            shutil.rmtree(self._shards, ignore_errors=True)
            (self.path / FILENAME).unlink(missing_ok=True)
        self._shards.mkdir(parents=True, exist_ok=True)
        for temporary in self._shards.glob(".*.tmp"):
            temporary.unlink()
        for shard in sorted(self._shards.glob("*.parquet")):
            found = _plan_of(shard)
            if found is None or (differing := self.plan.differing(found)):
                reason = (
                    "is none of nexus" if found is None else f"differs in {', '.join(differing)}"
                )
                raise WorkspaceError(
                    f"{shard} belongs to another run: it {reason}",
                    hint="use --force to replace the store, or another --output-dir",
                )

    def find(self, shard: int) -> ShardRecord | None:
        """The record of a shard that is there already, whole."""
        path = self._path(shard)
        if not path.is_file():
            return None
        num_rows, metadata = read_metadata(path)
        return ShardRecord(
            file=path.name,
            num_rows=num_rows,
            num_targets=int(metadata["nexus.num_targets"]),
            nll_sum=float(metadata["nexus.nll_sum"]),
            sha256=sha256_file(path),
            bytes=path.stat().st_size,
        )

    def write(self, shard: int, rows: StoreRows) -> ShardRecord:
        """Write one shard, all of it or nothing.

        Raises:
            ResourceError: the disk is full. The shards written before stay.
            ValueError: these are not as many rows as the shard has.
        """
        if len(rows) != len(self.plan.shard_rows(shard)):
            raise ValueError(f"shard {shard} takes {len(self.plan.shard_rows(shard))} rows")
        num_targets = int(rows.loss_mask_BS[:, 1:].sum())
        nll_sum = float(rows.nll_BS.sum(dtype=np.float64))
        data = encode(
            rows,
            precision=self.plan.precision,
            compression=self.plan.compression,
            metadata={
                _PLAN: self.plan.model_dump_json(),
                "nexus.num_targets": str(num_targets),
                "nexus.nll_sum": repr(nll_sum),
            },
        )
        path = self._path(shard)
        try:
            write_atomic(path, data)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise ResourceError(
                f"no space left for {path} ({len(data) / 2**20:.1f} MiB); "
                f"the shards before it are whole",
                hint="free some space and run the same command again; it continues there",
            ) from error
        return ShardRecord(
            file=path.name,
            num_rows=len(rows),
            num_targets=num_targets,
            nll_sum=nll_sum,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
        )

    def finish(self, records: Sequence[ShardRecord]) -> StoreManifest:
        """Write ``store.json``, on one rank and after all shards; their order does not matter."""
        shards = tuple(sorted(records, key=lambda record: record.file))
        num_targets = sum(record.num_targets for record in shards)
        nll_sum = sum(record.nll_sum for record in shards)
        manifest = StoreManifest(
            plan=self.plan,
            complete=self.plan.complete,
            actual_steps=self.plan.actual_steps,
            num_targets=num_targets,
            teacher_nll=nll_sum / num_targets if num_targets else None,
            shards=shards,
        )
        write_atomic(self.path / FILENAME, manifest.model_dump_json(indent=2).encode())
        return manifest

    def _path(self, shard: int) -> Path:
        return self._shards / f"{shard:05d}.parquet"


def _plan_of(shard: Path) -> StorePlan | None:
    _, metadata = read_metadata(shard)
    try:
        return StorePlan.model_validate_json(metadata.get(_PLAN, ""))
    except ValidationError:
        return None
