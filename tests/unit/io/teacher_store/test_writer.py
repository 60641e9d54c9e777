import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nexus_cli.errors import ArtifactError, WorkspaceError
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.teacher_store.writer import DiskFullError, StoreWriter

HERE = Path(__file__).parent


@pytest.fixture
def writer_at(stores):
    def make(path, **changes):
        plan = stores.make_plan(**changes)
        return StoreWriter(path, plan, stores.make_ranks(plan.vocab_size))

    return make


@pytest.fixture(scope="module")
def rows(stores):
    return stores.make_rows(stores.make_plan()).rows


@pytest.fixture
def full_disk(monkeypatch):
    """Let the disk be full when the next files are flushed."""

    def no_space(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def set_(full):
        if full:
            monkeypatch.setattr(os, "fsync", no_space)
        else:
            monkeypatch.undo()

    return set_


def shards_of(path):
    return {file.name: file.read_bytes() for file in (path / "shards").glob("*.parquet")}


def test_the_manifest_says_what_is_in_the_store(stores, rows, tmp_path):
    said = stores.write_store(tmp_path, stores.make_plan(), rows)
    manifest = json.loads((tmp_path / "store.json").read_text())
    assert manifest["format"] == "nexus-topk/1"
    assert manifest["ended_early"] is None
    assert [shard["num_rows"] for shard in manifest["shards"]] == [10, 10, 2]
    targets = [int(mask_S[1:].sum()) for mask_S in rows.loss_mask_BS]
    entries_M = np.isfinite(rows.kept.logprobs_MK).sum(1)
    for shard, first in zip(manifest["shards"], (0, 10, 20), strict=True):
        file = tmp_path / "shards" / shard["file"]
        assert (shard["sha256"], shard["bytes"]) == (sha256_file(file), file.stat().st_size)
        assert shard["num_targets"] == sum(targets[first : first + 10])
    assert sum(shard["num_entries"] for shard in manifest["shards"]) == entries_M.sum()
    assert said.num_targets == sum(targets)
    assert said.mean_k == pytest.approx(entries_M.sum() / sum(targets))
    assert said.teacher_nll == pytest.approx(rows.kept.nll_M.sum(dtype=np.float64) / sum(targets))
    assert (said.num_rows, said.actual_steps) == (22, 11)
    left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    shards = {"00000.parquet", "00001.parquet", "00002.parquet"}
    assert left == shards | {"store.json", "vocab_rank.npy"}


def test_a_shard_does_not_depend_on_the_order_of_writing_or_the_parts_it_came_in(
    stores, rows, tmp_path
):
    stores.write_store(tmp_path / "one", stores.make_plan(), rows)
    plan = stores.make_plan()
    writer = StoreWriter(tmp_path / "two", plan, stores.make_ranks(50))
    writer.prepare()
    for shard in (1, 2, 0):
        span = plan.shard_rows(shard)
        writer.add(span, stores.take(rows, span))
        writer.close(shard)
    one, two = (
        {
            name: pq.read_table(tmp_path / folder / "shards" / name)
            for name in shards_of(tmp_path / folder)
        }
        for folder in ("one", "two")
    )
    assert one == two


def test_text_that_ran_out_leaves_a_store_with_its_true_size(stores, tmp_path):
    plan = stores.make_plan(num_rows=7)
    stores.write_store(tmp_path, plan, stores.make_rows(plan).rows)
    store = stores.open_at(tmp_path)
    assert (len(store), store.manifest.actual_steps, store.manifest.ended_early) == (7, 3, "text")


def test_shards_of_another_plan_are_refused_and_replaced_when_forced(
    stores, rows, tmp_path, writer_at
):
    stores.write_store(tmp_path, stores.make_plan(), rows)
    writer_at(tmp_path, teacher_name="renamed").prepare()
    other = writer_at(tmp_path, top_k=4, seq_len=8, teacher_name="renamed")
    with pytest.raises(WorkspaceError, match=r"00000\.parquet .* differs in seq_len, top_k$"):
        other.prepare()
    other.prepare(force=True)
    assert not shards_of(tmp_path)
    assert not (tmp_path / "store.json").exists()


def test_a_foreign_parquet_file_is_refused(tmp_path, writer_at):
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "shards" / "00000.parquet")
    with pytest.raises(WorkspaceError, match="none of nexus"):
        writer_at(tmp_path).prepare()


def test_a_truncated_shard_is_named_before_anything_is_written(stores, rows, tmp_path, writer_at):
    stores.write_store(tmp_path, stores.make_plan(), rows)
    shard = tmp_path / "shards" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"00001\.parquet is damaged") as caught:
        writer_at(tmp_path).prepare()
    assert "delete it" in caught.value.hint


def test_a_shard_takes_its_own_number_of_rows(stores, rows, tmp_path, writer_at):
    writer = writer_at(tmp_path)
    writer.prepare()
    writer.add(range(20, 23), stores.take(rows, range(3)))
    with pytest.raises(ValueError, match="shard 2 takes 2 rows, not 3"):
        writer.close(2)


def test_a_full_disk_keeps_the_whole_shards_and_a_store_of_their_size(
    stores, rows, tmp_path, writer_at, full_disk
):
    writer = writer_at(tmp_path / "full")
    writer.prepare()
    first = stores.write_shard_of(writer, rows, 0)
    ballast = tmp_path / "full" / ".room-for-store.json"
    room = ballast.stat().st_size
    assert not writer.stopped
    full_disk(True)
    with pytest.raises(DiskFullError, match=r"no space left for .*00001\.parquet \(\d+\.\d MiB\)"):
        stores.write_shard_of(writer, rows, 1)
    full_disk(False)
    assert writer.stopped
    assert sorted(file.name for file in (tmp_path / "full" / "shards").iterdir()) == [first.file]

    said = writer.finish([first])
    assert not ballast.exists()
    assert (tmp_path / "full" / "store.json").stat().st_size <= room
    assert (said.ended_early, said.num_rows, said.actual_steps) == ("disk", 10, 5)
    store = stores.open_at(tmp_path / "full")
    stores.assert_same_text(store.rows(range(10)), stores.take(rows, range(10)))

    again = writer_at(tmp_path / "full")
    again.prepare()
    assert not again.stopped
    assert again.find(0) == first
    assert again.find(1) is None
    records = [first, *(stores.write_shard_of(again, rows, shard) for shard in (1, 2))]
    whole = again.finish(records)
    assert whole == stores.write_store(tmp_path / "unbroken", stores.make_plan(), rows)
    assert shards_of(tmp_path / "full") == shards_of(tmp_path / "unbroken")


def test_every_rank_learns_that_the_disk_of_one_is_full(
    stores, rows, tmp_path, full_disk, writer_at
):
    mine, theirs = writer_at(tmp_path), writer_at(tmp_path)
    mine.prepare()
    assert not theirs.stopped
    full_disk(True)
    with pytest.raises(DiskFullError):
        stores.write_shard_of(mine, rows, 0)
    assert theirs.stopped


def test_a_store_with_a_shard_missing_between_others_reads_as_those_in_order(
    stores, rows, tmp_path
):
    said = stores.write_store(tmp_path, stores.make_plan(), rows, shards=[0, 2])
    assert (said.ended_early, said.num_rows) == ("disk", 12)
    store = stores.open_at(tmp_path)
    assert len(store) == 12
    index = [*range(10), 20, 21]
    stores.assert_same_text(store.rows(range(12)), stores.take(rows, index))
    stores.assert_same_text(store.rows([11, 3, 10]), stores.take(rows, [21, 3, 20]))
    with pytest.raises(IndexError):
        store.rows([12])
    whole = stores.write_store(tmp_path, stores.make_plan(), rows)
    assert (whole.ended_early, whole.num_rows) == (None, 22)


def test_there_is_room_for_the_manifest_of_very_many_shards(stores, tmp_path):
    plan = stores.make_plan(num_rows=400, batch_size=2, rows_per_shard=2, requested_steps=200)
    writer = StoreWriter(tmp_path, plan, stores.make_ranks(50))
    writer.prepare()
    rows = stores.make_rows(stores.make_plan(num_rows=2)).rows
    writer.add(range(2), rows)
    record = writer.close(0)
    room = (tmp_path / ".room-for-store.json").stat().st_size
    large = {
        "num_targets": 10**9,
        "num_entries": 10**11,
        "nll_sum": 123456789.123456,
        "bytes": 10**9,
    }
    writer.finish(
        [record.model_copy(update=large | {"file": f"{i:05}.parquet"}) for i in range(200)]
    )
    assert (tmp_path / "store.json").stat().st_size <= room


def test_a_disk_without_room_for_the_table_of_ranks_is_said_before_the_teacher_is_asked(
    tmp_path, full_disk, writer_at
):
    full_disk(True)
    with pytest.raises(DiskFullError, match="no space left for"):
        writer_at(tmp_path).prepare()


def test_another_failure_of_the_disk_is_not_called_full(
    stores, rows, tmp_path, writer_at, monkeypatch
):
    def broken(_):
        raise OSError(errno.EIO, "Input/output error")

    writer = writer_at(tmp_path)
    writer.prepare()
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output") as caught:
        stores.write_shard_of(writer, rows, 0)
    assert not isinstance(caught.value, DiskFullError)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {here!r})
    import conftest as stores
    from nexus_cli.io.teacher_store.writer import StoreWriter

    plan = stores.make_plan()
    rows = stores.make_rows(plan).rows
    writer = StoreWriter(Path({path!r}), plan, stores.make_ranks(plan.vocab_size))
    writer.prepare()
    stores.write_shard_of(writer, rows, 0)
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    stores.write_shard_of(writer, rows, 1)
"""


def test_a_kill_in_the_middle_of_a_shard_leaves_only_whole_ones(stores, rows, tmp_path, writer_at):
    path = tmp_path / "killed"
    code = textwrap.dedent(KILLED).format(here=str(HERE), path=str(path))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert list((path / "shards").glob(".*.tmp")), "it died while it wrote"
    with pytest.raises(ArtifactError, match="unfinished"):
        stores.open_at(path)

    writer = writer_at(path)
    writer.prepare()
    assert not list((path / "shards").glob(".*"))
    kept = writer.find(0)
    assert kept is not None
    assert writer.find(1) is None
    records = [kept, *(stores.write_shard_of(writer, rows, shard) for shard in (1, 2))]
    resumed = writer.finish(records)
    assert resumed == stores.write_store(tmp_path / "unbroken", stores.make_plan(), rows)
    assert shards_of(path) == shards_of(tmp_path / "unbroken")


def test_force_keeps_what_an_unfinished_run_of_the_same_plan_wrote(
    stores, rows, writer_at, tmp_path
):
    first = writer_at(tmp_path)
    first.prepare(force=True)
    record = stores.write_shard_of(first, rows, 1)
    again = writer_at(tmp_path)
    again.prepare(force=True)
    assert again.find(1) == record


def test_force_makes_a_finished_store_again_and_its_manifest_goes_first(
    stores, rows, writer_at, tmp_path
):
    stores.write_store(tmp_path, stores.make_plan(), rows)
    writer_at(tmp_path).prepare(force=True)
    assert not (tmp_path / "store.json").exists()
    assert shards_of(tmp_path) == {}


def test_a_shard_damaged_before_a_run_goes_on_is_made_again(stores, rows, writer_at, tmp_path):
    writer = writer_at(tmp_path)
    writer.prepare()
    record = stores.write_shard_of(writer, rows, 0)
    shard = tmp_path / "shards" / record.file
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    again = writer_at(tmp_path)
    again.prepare()
    assert again.find(0) is None
    assert stores.write_shard_of(again, rows, 0) == record
