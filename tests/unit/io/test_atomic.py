"""A reader sees all of a file or folder, or none of it."""

import pytest

from nexus_cli.io.atomic import atomic_directory, atomic_file, write_atomic


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def fail():
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"

    def fail():
        with atomic_directory(path) as temporary:
            (temporary / "a").write_text("half")
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("first", "second"):
        with atomic_directory(tmp_path / "model") as temporary:
            (temporary / name).write_text(name)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
