"""One process at a time in a stage."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexus_cli.errors import ResourceError, WorkspaceError


@contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold ``path``; the kernel drops it when the process dies.

    Args:
        path: the lock's file.
        wait: until another process lets go of it; otherwise that is an error at once.

    Raises:
        WorkspaceError: another process holds it.
        ResourceError: the folder cannot be written, or its file system knows no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ResourceError(
            f"cannot write in {path.parent}: {error.strerror}",
            hint="use another --workspace or output path",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise WorkspaceError(
                f"{path.parent} is in use by another nexus process",
                hint="wait for it to finish, or use another --workspace",
            ) from error
        except OSError as error:
            raise ResourceError(
                f"the file system of {path.parent} has no locks: {error.strerror}",
                hint="use a --workspace on a local disk",
            ) from error
        yield
