import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nexus_cli.core.data import text_files
from nexus_cli.core.data.errors import BadFileError
from nexus_cli.core.data.files import find_files, kind_of, read_rows

ROWS = [{"text": f"Text number {i}: \u00e4\U0001f642"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def compressed(data, suffix):
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":
        return pa.Codec("zstd").compress(data, asbytes=True)
    return data


def values(path):
    return [value for _, value in read_rows(path)]


def broken(path):
    with pytest.raises(BadFileError) as caught:
        values(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("lines.json", LINES),
        ("array.json", json.dumps(ROWS, indent=2).encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("blank.jsonl", b"\n" + LINES.replace(b"\n", b"\r\n\r\n")),
    ],
)
def test_rows_are_read_from_every_kind_of_text_file(tmp_path, name, data, suffix):
    path = tmp_path / (name + suffix)
    path.write_bytes(compressed(data, suffix))
    assert values(path) == ROWS


def test_one_object_over_several_lines_is_one_row(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert values(path) == ROWS[:1]


def test_an_array_is_read_in_pieces_smaller_than_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK", 7)
    path = tmp_path / "array.json"
    path.write_text(json.dumps(ROWS))
    assert values(path) == ROWS


def test_a_book_becomes_pieces_that_hold_all_of_it_once(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * (i % 400) + "\n" for i in range(300)]
    book = "\n".join(paragraphs)
    path = tmp_path / "book.txt"
    path.write_text(book)
    pieces = [row["text"] for row in values(path)]
    assert "".join(pieces).split() == book.split()
    assert max(map(len, pieces)) <= text_files.PIECE
    assert len(pieces) > 10


def test_tables_are_read_without_the_nulls_that_their_columns_add(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}], "n": None},
        {"messages": [{"role": "user", "content": None, "name": "b"}], "n": 1},
    ]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert values(path) == [
        {"messages": [{"role": "user", "content": "a"}], "n": None},
        {"messages": [{"role": "user", "name": "b"}], "n": 1},
    ]


@pytest.mark.parametrize(
    "name", ["e.jsonl", "e.json", "e.txt", "e.parquet", "e.arrow", "e.jsonl.gz"]
)
@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_an_empty_file_is_an_error(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    broken(path)


def test_an_array_or_table_without_rows_is_an_error(tmp_path):
    array, table = tmp_path / "a.json", tmp_path / "t.parquet"
    array.write_text("[]")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), table)
    assert "no rows" in broken(array)
    assert "no rows" in broken(table)


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + b"{'text': 1}\n")
    assert "line 6: not JSON" in broken(path)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + '{"text": "\u00e9"}\n'.encode("latin-1"))
    assert "line 6: not UTF-8" in broken(path)
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"fine\n\xff\xfe\n")
    assert "line 2: not UTF-8" in broken(plain)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_truncated_compressed_file_is_an_error(tmp_path, name, suffix):
    path = tmp_path / (name + suffix)
    path.write_bytes(compressed(LINES * 50, suffix)[:-20])
    broken(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(LINES)
    broken(path)


def test_a_truncated_array_is_an_error_that_names_the_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS)[:-20])
    assert "row 5" in broken(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_pointer_of_git_lfs_is_recognised(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(BadFileError) as caught:
        values(path)
    assert "git lfs pull" in caught.value.hint


def test_beside_tables_json_and_text_files_are_metadata(tmp_path):
    for name in (
        "b.jsonl",
        "sub/a.jsonl.gz",
        "dataset_infos.json",
        "LICENSE.txt",
        ".cache/c.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    assert [path.name for path in find_files(tmp_path)] == ["b.jsonl", "a.jsonl.gz"]


def test_a_folder_of_text_files_is_read_as_such(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "README.md").write_text("x")
    assert find_files(tmp_path) == [tmp_path / "a.txt"]


@pytest.mark.parametrize("name", ["a.md", "a.parquet.gz", "a", "a.gz", "a.bin"])
def test_other_files_are_not_text(tmp_path, name):
    (tmp_path / name).write_text("x")
    assert kind_of(tmp_path / name) is None
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(BadFileError, match="text"):
            find_files(path)


def save_to_disk(path, rows):
    """What ``datasets.Dataset.save_to_disk`` writes: Arrow streams and their list."""
    path.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    half = len(rows) // 2
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, half), table.slice(half)), strict=True):
        with pa.ipc.new_stream(path / name, table.schema) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")


def test_a_save_to_disk_folder_is_read_in_its_own_order(tmp_path):
    save_to_disk(tmp_path / "saved", ROWS)
    read = [row for path in find_files(tmp_path / "saved") for row in values(path)]
    assert read == ROWS


def test_a_folder_that_datasets_itself_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    datasets.disable_progress_bars()
    datasets.DatasetDict(train=datasets.Dataset.from_list(chat)).save_to_disk(tmp_path / "saved")
    (path,) = find_files(tmp_path / "saved")
    assert values(path) == chat


def test_saved_splits_without_train_are_to_be_named(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(BadFileError) as caught:
        find_files(tmp_path)
    assert "test" in caught.value.hint


def test_an_incomplete_save_to_disk_folder_is_an_error(tmp_path):
    save_to_disk(tmp_path / "saved", ROWS)
    (tmp_path / "saved/data-00001-of-00002.arrow").unlink()
    with pytest.raises(BadFileError, match="00001"):
        find_files(tmp_path / "saved")
