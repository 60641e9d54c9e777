import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow.parquet as pq
import pytest

from nexus_cli.errors import ArtifactError, ConfigError, ResourceError, WorkspaceError
from nexus_cli.io.teacher_shards import StoreRows
from nexus_cli.io.teacher_store import StorePlan, open_store
from nexus_cli.io.teacher_writer import StoreWriter

# Shape letters: B rows, S positions, K kept entries.

S, K, V = 12, 3, 50


def make_plan(**changes):
    values = {
        "teacher": "t" * 64,
        "teacher_name": "tiny",
        "tokenizer": "k" * 64,
        "data_digest": "d" * 64,
        "sources": ("a", "b"),
        "vocab_size": V,
        "top_k": K,
        "precision": "float32",
        "dtype": "float32",
        "compression": "zstd",
        "seq_len": S,
        "batch_size": 2,
        "requested_steps": 11,
        "num_rows": 22,
        "rows_per_shard": 10,
    }
    return StorePlan(**values | changes)


def make_rows(num_rows=22, seed=0):
    """Rows as ``precompute`` makes them: no distribution where the next token is no target."""
    rng = np.random.default_rng(seed)
    probs_BSK1 = rng.dirichlet(np.ones(K + 1), (num_rows, S))
    mask_BS = rng.random((num_rows, S)) < 0.7
    held_BS = np.roll(mask_BS, -1, axis=1)
    held_BS[:, -1] = False
    logprobs_BSK = np.where(held_BS[..., None], np.log(probs_BSK1[..., :K]), -np.inf)
    return StoreRows(
        input_ids_BS=rng.integers(V, size=(num_rows, S)).astype(np.int32),
        position_ids_BS=np.tile(np.arange(S, dtype=np.int32), (num_rows, 1)),
        loss_mask_BS=mask_BS,
        source_B=(np.arange(num_rows) % 2).astype(np.int16),
        ids_BSK=np.argsort(rng.random((num_rows, S, V)), axis=-1)[..., :K].astype(np.int32),
        logprobs_BSK=logprobs_BSK.astype(np.float32),
        tail_BS=np.where(held_BS, np.log(probs_BSK1[..., K]), np.nan).astype(np.float32),
        nll_BS=np.where(held_BS, rng.exponential(size=(num_rows, S)), 0).astype(np.float32),
    )


def write_store(path, plan=None, rows=None):
    plan = plan or make_plan()
    rows = rows or make_rows(plan.num_rows)
    writer = StoreWriter(path, plan)
    writer.prepare()
    records = []
    for shard in reversed(range(plan.num_shards)):
        span = plan.shard_rows(shard)
        records.append(writer.write(shard, rows.take(slice(span.start, span.stop))))
    writer.finish(records)
    return rows


def assert_same(actual, expected, **tolerance):
    for name in StoreRows.__dataclass_fields__:
        np.testing.assert_allclose(
            getattr(actual, name), getattr(expected, name), err_msg=name, **tolerance
        )


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "none"])
def test_rows_come_back_as_they_went_in(tmp_path, compression):
    rows = write_store(tmp_path, make_plan(compression=compression))
    assert_same(open_store(tmp_path).rows(range(22)), rows, rtol=0, atol=0)
    column = pq.ParquetFile(tmp_path / "shards" / "00000.parquet").metadata.row_group(0).column(4)
    assert column.compression.lower() == {"none": "uncompressed"}.get(compression, compression)


def test_rows_come_in_any_order_and_number(tmp_path):
    rows = write_store(tmp_path)
    store = open_store(tmp_path)
    for index in ([21], [3, 3, 19, 0], np.random.default_rng(0).permutation(22)):
        assert_same(store.rows(index), rows.take(np.asarray(index)), rtol=0, atol=0)


def test_more_rows_than_the_cache_holds_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("nexus_cli.io.teacher_store._CACHED_GROUPS", 1)
    monkeypatch.setattr("nexus_cli.io.teacher_store._OPEN_SHARDS", 1)
    rows = write_store(tmp_path)
    store = open_store(tmp_path)
    for index in ([0, 21], [21, 0]):
        assert_same(store.rows(index), rows.take(np.asarray(index)), rtol=0, atol=0)


def test_half_precision_rounds_log_probabilities_and_still_sums_to_one_with_the_tail(tmp_path):
    rows = write_store(tmp_path, make_plan(precision="float16"))
    read = open_store(tmp_path).rows(range(22))
    assert_same(read, rows, rtol=2e-3, atol=2e-3)
    held_BS = ~np.isnan(rows.tail_BS)
    assert np.array_equal(np.isnan(read.tail_BS), ~held_BS)
    assert np.isneginf(read.logprobs_BSK[~held_BS]).all()
    total_BS = np.exp(read.logprobs_BSK, dtype=np.float64).sum(-1) + np.exp(read.tail_BS)
    np.testing.assert_allclose(total_BS[held_BS], 1, atol=1e-6)


def test_the_manifest_says_what_is_in_the_store(tmp_path):
    rows = write_store(tmp_path)
    manifest = json.loads((tmp_path / "store.json").read_text())
    assert manifest["format"] == "nexus.teacher_store/1"
    assert manifest["complete"] is True
    assert manifest["actual_steps"] == 11
    assert [shard["num_rows"] for shard in manifest["shards"]] == [10, 10, 2]
    num_targets = np.count_nonzero(rows.loss_mask_BS[:, 1:])
    assert manifest["num_targets"] == num_targets
    assert manifest["teacher_nll"] == pytest.approx(rows.nll_BS.sum() / num_targets)


def test_text_that_ran_out_leaves_a_store_with_its_true_size(tmp_path):
    write_store(tmp_path, make_plan(num_rows=7))
    store = open_store(tmp_path)
    assert (len(store), store.manifest.actual_steps, store.manifest.complete) == (7, 3, False)


def test_a_row_that_is_not_there_is_an_index_error(tmp_path):
    write_store(tmp_path)
    for row in (22, -1):
        with pytest.raises(IndexError, match="22 rows"):
            open_store(tmp_path).rows([row])


def test_only_the_stored_temperature_is_served(tmp_path):
    write_store(tmp_path)
    store = open_store(tmp_path)
    store.require_temperatures([1.0])
    with pytest.raises(ConfigError, match="temperature 1, not at 4 or 2"):
        store.require_temperatures([4.0, 2.0])


def damage_nothing_there(path):
    for file in path.rglob("*"):
        if file.is_file():
            file.unlink()
    (path / "shards").rmdir()


def damage_unfinished(path):
    (path / "store.json").unlink()


def damage_missing_shard(path):
    (path / "shards" / "00001.parquet").unlink()


def damage_truncated_shard(path):
    shard = path / "shards" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])


def damage_not_json(path):
    (path / "store.json").write_text("{")


def edit(path, change):
    manifest = json.loads((path / "store.json").read_text())
    change(manifest)
    (path / "store.json").write_text(json.dumps(manifest))


def damage_other_format(path):
    edit(path, lambda manifest: manifest.update(format="nexus-topk/1"))


def damage_lost_field(path):
    edit(path, lambda manifest: manifest["plan"].pop("top_k"))


def damage_lost_shard_record(path):
    edit(path, lambda manifest: manifest["shards"].pop())


def damage_path_outside(path):
    edit(path, lambda manifest: manifest["shards"][0].update(file="../store.json"))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (damage_nothing_there, "is no teacher store"),
        (damage_unfinished, "unfinished teacher store"),
        (damage_missing_shard, "lacks the shard '00001.parquet'"),
        (damage_truncated_shard, "is truncated"),
        (damage_not_json, "not valid JSON"),
        (damage_other_format, "has the format 'nexus-topk/1'"),
        (damage_lost_field, "is damaged"),
        (damage_lost_shard_record, "do not make 22 rows"),
        (damage_path_outside, "lacks the shard '../store.json'"),
    ],
)
def test_a_store_that_is_not_whole_is_refused_in_one_sentence(tmp_path, damage, complaint):
    write_store(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        open_store(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_shard_with_changed_contents_is_refused_when_it_is_first_read(tmp_path):
    write_store(tmp_path)
    shard = tmp_path / "shards" / "00001.parquet"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    store = open_store(tmp_path)
    store.rows([0])
    with pytest.raises(ArtifactError, match="not the shard that store"):
        store.rows([10])


@pytest.mark.parametrize(
    ("expected", "complaint"),
    [
        ({"vocab_size": 51}, "another vocabulary size: 50, not 51"),
        ({"tokenizer": "x" * 64}, "another tokenizer"),
        ({"teacher": "x" * 64}, r"another teacher \(tiny\)"),
    ],
)
def test_a_store_of_another_model_is_refused(tmp_path, expected, complaint):
    write_store(tmp_path)
    open_store(tmp_path, vocab_size=V, tokenizer="k" * 64, teacher="t" * 64)
    with pytest.raises(ArtifactError, match=complaint):
        open_store(tmp_path, **expected)


def test_shards_of_another_plan_are_refused_and_replaced_when_forced(tmp_path):
    write_store(tmp_path)
    other = StoreWriter(tmp_path, make_plan(top_k=4, seq_len=8, teacher_name="renamed"))
    with pytest.raises(WorkspaceError, match="differs in seq_len, top_k"):
        other.prepare()
    other.prepare(force=True)
    assert list((tmp_path / "shards").iterdir()) == []
    assert not (tmp_path / "store.json").exists()


def test_a_foreign_parquet_file_is_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    import pyarrow as pa

    pq.write_table(pa.table({"x": [1]}), tmp_path / "shards" / "00000.parquet")
    with pytest.raises(WorkspaceError, match="none of nexus"):
        StoreWriter(tmp_path, make_plan()).prepare()


def test_a_shard_takes_its_own_number_of_rows(tmp_path):
    writer = StoreWriter(tmp_path, make_plan())
    with pytest.raises(ValueError, match="shard 2 takes 2 rows"):
        writer.write(2, make_rows(3))


def test_a_full_disk_is_said_in_one_line_and_keeps_the_whole_shards(tmp_path, monkeypatch):
    plan, rows = make_plan(), make_rows()
    writer = StoreWriter(tmp_path, plan)
    writer.prepare()
    first = writer.write(0, rows.take(slice(0, 10)))

    def no_space(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(ResourceError, match="no space left"):
            writer.write(1, rows.take(slice(10, 20)))
    assert sorted(file.name for file in (tmp_path / "shards").iterdir()) == ["00000.parquet"]

    again = StoreWriter(tmp_path, plan)
    again.prepare()
    assert again.find(0) == first
    assert again.find(1) is None


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {folder!r})
    from test_teacher_store import StoreWriter, make_plan, make_rows
    from nexus_cli.io import teacher_writer

    plan, rows = make_plan(), make_rows()
    writer = StoreWriter(Path({path!r}), plan)
    writer.prepare()
    writer.write(0, rows.take(slice(0, 10)))
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    writer.write(1, rows.take(slice(10, 20)))
"""


def test_a_kill_in_the_middle_of_a_shard_leaves_only_whole_ones(tmp_path):
    code = textwrap.dedent(KILLED).format(
        folder=os.path.dirname(__file__),  # noqa: PTH120
        path=str(tmp_path / "killed"),
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr

    plan, rows = make_plan(), make_rows()
    writer = StoreWriter(tmp_path / "killed", plan)
    writer.prepare()
    assert not list((tmp_path / "killed" / "shards").glob(".*"))
    kept = writer.find(0)
    assert kept is not None
    assert writer.find(1) is None
    records = [kept]
    for shard in (1, 2):
        span = plan.shard_rows(shard)
        records.append(writer.write(shard, rows.take(slice(span.start, span.stop))))
    resumed = writer.finish(records)

    write_store(tmp_path / "unbroken", plan, rows)
    assert resumed == open_store(tmp_path / "unbroken").manifest
