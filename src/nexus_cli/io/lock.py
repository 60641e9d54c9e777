"""One process at a time in a stage."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexus_cli.errors import WorkspaceError


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold ``path`` or fail at once; the kernel drops it when the process dies.

    Raises:
        WorkspaceError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkspaceError(
                f"{path.parent} is in use by another nexus process",
                hint="wait for it to finish, or use another --workspace",
            ) from error
        yield
