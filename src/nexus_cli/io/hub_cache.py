"""The cache that the hub's own tools share: which repository a folder of it is of, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PREFIX = "models--"
SNAPSHOTS = "snapshots"


def root() -> Path:
    """The cache's folder, from the variables that huggingface_hub reads, in its order."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if found := os.environ.get(name):
            return Path(found).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def repository_of(path: Path) -> tuple[str, str] | None:
    """Name and revision of a model in a hub cache; ``None`` for a folder anywhere else.

    ``.../models--openai--gpt-oss-20b/snapshots/6cee...`` is ``openai/gpt-oss-20b`` at ``6cee...``.
    The cache may be another one than :func:`root`.
    """
    folder = path.parent.parent.name
    if path.parent.name != SNAPSHOTS or not folder.startswith(PREFIX):
        return None
    return folder.removeprefix(PREFIX).replace("--", "/"), path.name


def snapshots(repository: str, revision: str | None) -> Iterator[Path]:
    """The folders of a repository's revisions in the cache, ``revision`` first."""
    folder = root() / f"{PREFIX}{repository.replace('/', '--')}" / SNAPSHOTS
    if not folder.is_dir():
        return
    yield from sorted(folder.iterdir(), key=lambda path: (path.name != revision, path.name))
