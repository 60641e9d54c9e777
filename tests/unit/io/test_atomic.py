"""A reader sees all of a file or folder, or none of it."""

import os

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


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    path = tmp_path / "model"
    with atomic_directory(path) as temporary:
        (temporary / "first").write_text("first")
    path.rename(tmp_path / ".model.old")  # as the kill leaves it

    def fail():
        with atomic_directory(path):
            assert (path / "first").read_text() == "first"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_kill_after_the_two_renames_leaves_no_old_copy_for_ever(tmp_path):
    path = tmp_path / "model"
    for folder in (path, tmp_path / ".model.old"):
        folder.mkdir()
    with atomic_directory(path) as temporary:
        (temporary / "second").write_text("second")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_new_files_are_as_readable_as_the_umask_says_and_linked_ones_are_left_alone(tmp_path):
    base = tmp_path / "base"
    base.write_text("theirs")
    base.chmod(0o440)
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "sub").mkdir()
        for file in (folder / "shard", folder / "sub" / "state"):
            file.write_text("mine")
            file.chmod(0o600)  # as safetensors does
        os.link(base, folder / "linked")
        (folder / "pointed").symlink_to(base)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("mine")
        temporary.chmod(0o600)
    (tmp_path / "plain").write_text("as any program writes it")
    usual = (tmp_path / "plain").stat().st_mode
    for path in ("model/shard", "model/sub/state", "file"):
        assert (tmp_path / path).stat().st_mode == usual
    assert base.stat().st_mode & 0o777 == 0o440
