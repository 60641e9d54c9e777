import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.location import locate
from nexus_cli.io.teacher_store.columns import Codec
from nexus_cli.io.teacher_store.reader import open_store
from nexus_cli.io.teacher_store.shard import ShardReader

# Shape letters: B rows.


@pytest.mark.parametrize(
    ("compression", "codec"),
    [("zstd", "ZSTD"), ("snappy", "SNAPPY"), ("gzip", "GZIP"), ("none", "UNCOMPRESSED")],
)
def test_every_compression_reads_the_same(stores, written, tmp_path, compression, codec):
    plan = stores.make_plan(compression=compression)
    stores.write_store(tmp_path, plan, written.said.rows)
    stores.assert_same(stores.open_at(tmp_path).rows(range(22)), written.rows)
    shard = pq.ParquetFile(tmp_path / "shards" / "00000.parquet")
    group = shard.metadata.row_group(0)
    assert {group.column(c).compression for c in range(group.num_columns)} == {codec}


@pytest.mark.parametrize("seq_len", [12, 2_000], ids=["one row group", "groups of two rows"])
def test_rows_come_in_any_order_and_number(stores, tmp_path, seq_len):
    plan = stores.make_plan(seq_len=seq_len, num_rows=22 if seq_len == 12 else 7, rows_per_shard=5)
    rows = stores.make_rows(plan, held=0.7 if seq_len == 12 else 0.01).rows
    stores.write_store(tmp_path, plan, rows)
    store = stores.open_at(tmp_path)
    whole = store.rows(range(plan.num_rows))
    stores.assert_same_text(whole, rows)
    shuffled = np.random.default_rng(0).permutation(plan.num_rows)
    for index in ([plan.num_rows - 1], [3, 3, 6, 0], shuffled, []):
        if len(index):
            stores.assert_same(store.rows(index), stores.take(whole, index))
            stores.assert_same_text(store.rows(index), stores.take(rows, index))


def test_caches_smaller_than_what_is_read_change_nothing(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("nexus_cli.io.teacher_store.reader._OPEN_SHARDS", 1)
    monkeypatch.setattr("nexus_cli.io.teacher_store.shard._CACHED_GROUPS", 1)
    monkeypatch.setattr("nexus_cli.io.teacher_store.shard.GROUP_TOKENS", 24)
    monkeypatch.setattr("nexus_cli.io.teacher_store.reader._REMEMBERED_BYTES", 0)
    plan = stores.make_plan()
    rows = stores.make_rows(plan).rows
    stores.write_store(tmp_path, plan, rows)
    assert pq.ParquetFile(tmp_path / "shards" / "00000.parquet").num_row_groups == 5
    store = stores.open_at(tmp_path)
    for index in ([0, 21, 2, 11, 0], [21, 0], range(22)):
        stores.assert_same_text(store.rows(index), stores.take(rows, index))


def test_what_was_read_last_is_decoded_once_and_older_rows_again(stores, written, monkeypatch):
    decoded, decode = [], Codec.decode

    def counted(self, table):
        decoded.append(len(table))
        return decode(self, table)

    monkeypatch.setattr(Codec, "decode", counted)
    monkeypatch.setattr("nexus_cli.io.teacher_store.reader._REMEMBERED_BYTES", 1)
    store = stores.open_at(written.path)
    for index in ([3, 1], [3, 1], [1, 3], [3, 1]):
        stores.assert_same(store.rows(index), stores.take(written.rows, index))
    assert decoded == [2, 2, 2]
    monkeypatch.undo()
    monkeypatch.setattr(Codec, "decode", counted)
    store = stores.open_at(written.path)
    for index in ([0], [1], [2], [0], [1], [2]):
        store.rows(index)
    assert decoded == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("num_readers", [1, 2, 3])
def test_any_number_of_readers_share_the_rows_without_loss_or_repeat(stores, written, num_readers):
    def key(rows, b):
        row = stores.take(rows, [b])
        return row.input_ids_BS.tobytes() + row.kept.logprobs_MK.tobytes()

    found = Counter()
    for reader in range(num_readers):
        rows = stores.open_at(written.path).rows(range(reader, 22, num_readers))
        found.update(key(rows, b) for b in range(len(rows)))
    assert found == Counter(key(written.rows, b) for b in range(22))


def test_a_row_that_is_not_there_is_an_index_error(stores, written):
    for row in (22, -1):
        with pytest.raises(IndexError, match="22 rows"):
            stores.open_at(written.path).rows([row])


def test_tails_at_1_2_and_4_are_served_and_others_refused(stores, written):
    store = stores.open_at(written.path)
    store.require_temperatures([1.0, 2.0, 4, 1])
    with pytest.raises(ConfigError, match=r"1, 2 and 4, not at 1\.5 or 3$"):
        store.require_temperatures([3.0, 1.0, 1.5])
    with pytest.raises(ConfigError, match=r"not at 1\.1 or 1\.2 or 1\.3 or others$"):
        store.require_temperatures([1.1, 1.2, 1.3, 1.4, 1.5])


def test_a_store_of_the_whole_vocabulary_serves_any_temperature(stores, tmp_path):
    plan = stores.make_plan(top_k=50, top_p=1.0, num_rows=2, values="float32")
    stores.write_store(tmp_path, plan, stores.make_rows(plan).rows)
    store = stores.open_at(tmp_path)
    assert store.dense
    store.require_temperatures([1.5, 7.0])


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 49, "top_p": 1.0, "values": "float32"},
        {"top_k": 50, "top_p": 0.999, "values": "float32"},
        {"top_k": 50, "top_p": 1.0},  # codes end 16 nats below the likeliest token
    ],
)
def test_a_store_that_may_lack_a_token_is_not_dense(stores, tmp_path, changes):
    plan = stores.make_plan(num_rows=2, **changes)
    stores.write_store(tmp_path, plan, stores.make_rows(plan).rows)
    assert not stores.open_at(tmp_path).dense


def copy_of(written, path):
    """A store to damage."""
    for file in written.path.rglob("*"):
        if file.is_file():
            target = path / file.relative_to(written.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return path


def edit(path, change):
    manifest = json.loads((path / "store.json").read_text())
    change(manifest)
    (path / "store.json").write_text(json.dumps(manifest))


def nothing_there(path):
    for file in path.rglob("*.*"):
        file.unlink()
    (path / "shards").rmdir()


def unfinished(path):
    (path / "store.json").unlink()


def missing_shard(path):
    (path / "shards" / "00001.parquet").unlink()


def truncated_shard(path):
    shard = path / "shards" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])


def no_json(path):
    (path / "store.json").write_text("{")


def no_text(path):
    (path / "store.json").write_bytes(b"\xff\xfe\xfa")


def a_list(path):
    (path / "store.json").write_text("[]")


def other_format(path):
    edit(path, lambda manifest: manifest.update(format="nexus-topk/2"))


def lost_field(path):
    edit(path, lambda manifest: manifest["plan"].pop("top_k"))


def unknown_field(path):
    edit(path, lambda manifest: manifest["plan"].update(future=1))


def path_outside(path):
    edit(path, lambda manifest: manifest["shards"][0].update(file="../store.json"))


def path_inside(path):
    edit(path, lambda manifest: manifest["shards"][0].update(file="a/00000.parquet"))


def no_ranks(path):
    (path / "vocab_rank.npy").unlink()


def other_ranks(path):
    np.save(path / "vocab_rank.npy", np.arange(50, dtype=np.int32))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (nothing_there, "is no teacher store"),
        (unfinished, "is an unfinished teacher store"),
        (missing_shard, "lacks the shard '00001.parquet'"),
        (truncated_shard, r"00001\.parquet is truncated: \d+ of \d+ bytes"),
        (no_json, r"store\.json is damaged: it is no JSON"),
        (no_text, r"store\.json is damaged: it is no JSON"),
        (a_list, r"store\.json is damaged"),
        (other_format, "has the format 'nexus-topk/2'; this nexus reads nexus-topk/1"),
        (lost_field, r"store\.json is damaged"),
        (unknown_field, r"store\.json is damaged"),
        (path_outside, r"lacks the shard '\.\./store\.json'"),
        (path_inside, "lacks the shard 'a/00000.parquet'"),
        (no_ranks, r"lacks vocab_rank\.npy"),
        (other_ranks, r"vocab_rank\.npy is not the table that store\.json lists"),
    ],
)
def test_a_store_that_is_not_whole_is_refused_in_one_sentence(
    stores, written, tmp_path, damage, complaint
):
    path = copy_of(written, tmp_path)
    stores.open_at(path)
    damage(path)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        stores.open_at(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("expected", "complaint"),
    [
        ({"vocab_size": 51}, "another vocabulary size: 50, not 51"),
        ({"tokenizer": "x" * 64}, "another tokenizer: k{16}, not x{16}$"),
        ({"teacher": "x" * 64}, r"another teacher \(tiny\): t{16}, not x{16}$"),
    ],
)
def test_a_store_of_another_model_is_refused(stores, written, expected, complaint):
    stores.open_at(written.path, vocab_size=50, tokenizer="k" * 64, teacher="t" * 64)
    with pytest.raises(ArtifactError, match=complaint):
        stores.open_at(written.path, **expected)


def flip(path, column="id_low"):
    """Change one byte of a page of data."""
    where = pq.ParquetFile(path).metadata.row_group(0)
    names = [where.column(c).path_in_schema for c in range(where.num_columns)]
    chunk = where.column(names.index(column))
    place = chunk.data_page_offset + chunk.total_compressed_size - 3
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_a_flipped_byte_is_found_by_the_shards_hash_when_it_is_first_read(
    stores, written, tmp_path
):
    path = copy_of(written, tmp_path)
    flip(path / "shards" / "00001.parquet")
    store = stores.open_at(path)
    stores.assert_same(store.rows([0]), stores.take(written.rows, [0]))
    with pytest.raises(ArtifactError, match=r"00001\.parquet is not the shard that store\."):
        store.rows([10])
    assert store.verify() == ["00001.parquet"]
    assert stores.open_at(written.path).verify() == []


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_flipped_byte_is_found_by_the_pages_checksum_where_no_hash_is_checked(
    stores, written, tmp_path, compression
):
    plan = stores.make_plan(compression=compression)
    stores.write_store(tmp_path, plan, written.said.rows)
    shard = tmp_path / "shards" / "00001.parquet"
    flip(shard)
    edit(tmp_path, lambda manifest: manifest["shards"][1].update(sha256=sha256_file(shard)))
    store = stores.open_at(tmp_path)
    store.rows([0])
    with pytest.raises(ArtifactError, match=r"00001\.parquet is damaged"):
        store.rows([10])


def test_a_flipped_byte_in_an_object_store_is_damage_and_no_failure_of_the_server(
    stores, written, tmp_path, s3
):
    path = copy_of(written, tmp_path)
    flip(path / "shards" / "00001.parquet")
    store = open_store(locate(s3.upload(path, "reader/flipped")))
    stores.assert_same(store.rows([0]), stores.take(written.rows, [0]))
    with pytest.raises(ArtifactError, match=r"00001\.parquet is damaged"):
        store.rows([10])


def test_a_store_in_an_object_store_reads_the_same(stores, written, s3):
    store = open_store(locate(s3.upload(written.path, "reader/whole")))
    index = np.random.default_rng(0).permutation(22)
    stores.assert_same(store.rows(index), stores.take(written.rows, index))
    assert store.verify() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["tail_2_low"]),
        lambda table: table.set_column(
            table.column_names.index("k"), "k", pa.array([b"\x02"] * len(table), pa.binary())
        ),
        lambda table: table.set_column(
            table.column_names.index("ratio_2"), "ratio_2", pa.array([b""] * len(table))
        ),
        lambda table: table.set_column(
            table.column_names.index("label"),
            "label",
            pa.array([b"\xfe" * len(label) for label in table["label"].to_pylist()]),
        ),
        lambda table: table.set_column(
            table.column_names.index("text_low"), "text_low", pa.array([b"a"] * len(table))
        ),
    ],
    ids=["no tails", "too few counts", "no ratios", "labels outside", "too little text"],
)
def test_columns_that_do_not_fit_are_damage(stores, written, tmp_path, change):
    path = copy_of(written, tmp_path)
    shard = path / "shards" / "00000.parquet"
    pq.write_table(change(pq.read_table(shard)), shard)
    size, digest = shard.stat().st_size, sha256_file(shard)
    edit(path, lambda manifest: manifest["shards"][0].update(sha256=digest, bytes=size))
    with pytest.raises(ArtifactError, match=r"00000\.parquet is damaged"):
        stores.open_at(path).rows([0, 1, 2])


def test_an_object_store_is_asked_for_each_row_group_once(written, s3, monkeypatch):
    asked = []
    read = ShardReader._read_group

    def noted(self, group):
        asked.append((self._location.path, group))
        return read(self, group)

    monkeypatch.setattr(ShardReader, "_read_group", noted)
    store = open_store(locate(s3.upload(written.path, "reader/once")))
    store.rows(range(len(store)))
    assert len(asked) == len(set(asked))
