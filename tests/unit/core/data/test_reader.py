import json

import pytest

from nexus_cli.core.data.document import Document, LeftOut, is_held_out
from nexus_cli.core.data.errors import BadFileError
from nexus_cli.core.data.reader import SourceSpec, read_documents, shuffled
from nexus_cli.core.data.sources import LocalText


@pytest.fixture
def texts(tmp_path):
    """Two files of five hundred rows each, sorted by kind."""
    files = []
    for kind in ("a", "b"):
        path = tmp_path / f"{kind}.jsonl"
        rows = ({"text": f"{kind} {number}"} for number in range(500))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(path)
    return LocalText(tuple(files), origin=str(tmp_path))


def read(texts, **changes):
    spec = SourceSpec(**{"name": "x", "text": texts, "split": "all", **changes})
    return [item for item in read_documents(spec, 1) if isinstance(item, Document)]


def test_train_and_held_out_divide_the_documents_by_content(texts):
    whole, train, held = (read(texts, split=s, held_out=0.2) for s in ("all", "train", "held-out"))
    ids = [{document.id for document in part} for part in (whole, train, held)]
    assert len(whole) == 1000
    assert ids[1] | ids[2] == ids[0]
    assert not ids[1] & ids[2]
    assert 140 < len(held) < 260


def test_the_split_does_not_depend_on_the_seed_or_the_files(texts):
    held = {document.id for document in read(texts, split="held-out", held_out=0.1, seed=0)}
    again = {document.id for document in read(texts, split="held-out", held_out=0.1, seed=9)}
    assert held == again
    assert all(is_held_out(held_id, 0.1) for held_id in held)


def test_the_order_depends_on_the_seed_and_mixes_what_files_keep_apart(texts):
    first, again, other = (
        [document.text for document in read(texts, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first) == sorted(other)
    assert {text[0] for text in first[:20]} == {"a", "b"}


def test_reading_stops_at_the_limit(texts):
    limited = read(texts, max_documents=7)
    assert [d.id for d in limited] == [d.id for d in read(texts)[:7]]
    assert {document.source_index for document in limited} == {1}


def test_what_is_left_out_travels_in_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": ""}\n')
    spec = SourceSpec("x", LocalText((path,), "x"), "all")
    found = list(read_documents(spec, 0))
    assert LeftOut("empty text") in found
    assert len(found) == 2


def test_a_row_without_text_is_one_error_with_file_line_and_keys(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n{"uuid": 1, "body": "y"}\n')
    with pytest.raises(BadFileError) as caught:
        list(read_documents(SourceSpec("x", LocalText((path,), "x"), "all"), 0))
    message = str(caught.value)
    assert f"{path}, line 3" in message
    assert "uuid, body" in message


def test_a_shuffle_holds_no_more_than_its_window():
    for window in (1, 3, 100):
        taken = 0

        def count():
            nonlocal taken
            for item in range(50):
                taken += 1
                yield item

        made = []
        for item in shuffled(count(), window, "seed"):
            made.append(item)
            assert taken - len(made) <= window
        assert sorted(made) == list(range(50))
