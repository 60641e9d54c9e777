"""Write files and folders so that a reader sees all of one or none of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush to disk, then rename over it."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` if the block succeeds.

    The file gets the permissions that the user's umask gives, whatever its writer set.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; rename it over ``path`` at the end.

    A folder already at ``path`` is replaced. If the block fails, ``path`` is as it was; if the
    process is killed between the two renames of a replacement, the next call puts it back.
    New files get the permissions that the user's umask gives: safetensors writes its own for
    the owner alone. Files linked from elsewhere keep theirs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                if not file.is_symlink() and file.stat().st_nlink == 1:
                    file.chmod(mode)
                _flush(file)
        _replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(new: Path, path: Path) -> None:
    """Directories cannot be renamed over full ones, so the old one steps aside first."""
    if not path.exists():
        new.rename(path)
        return
    old = _aside(path)
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _recover(path: Path) -> None:
    """Finish or undo a replacement that a kill cut short."""
    old = _aside(path)
    if old.is_dir() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _flush(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
