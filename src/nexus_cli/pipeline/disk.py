"""A full disk, in the user's words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexus_cli.errors import ResourceError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Run a block that writes ``path``.

    Raises:
        ResourceError: the disk is full, or the user's share of it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise ResourceError(
            f"no space left for {path}",
            hint="free some, or use another --output or --workspace; the same command continues",
        ) from error
