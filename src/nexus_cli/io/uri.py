"""Spelling of a folder's location: a path, or a URI of an object store. Reads nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from nexus_cli.errors import ConfigError

REMOTE = ("s3", "gs", "hf")
UNDERSTOOD = (
    "a location is a path, file:///folder, s3://bucket/folder, gs://bucket/folder "
    "or hf://datasets/owner/name/folder"
)
# Of the hub. No part of a revision begins with a dot, and none is empty, as git has it: the hub's
# client makes a path of it.
REPOSITORY = re.compile(r"[0-9A-Za-z_][\w.-]*/[0-9A-Za-z_][\w.-]*", re.ASCII)
REVISION = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_-]*(?:[./][0-9A-Za-z_-]+)*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)(.*)", re.DOTALL)
_TYPES = ("datasets", "spaces")  # of the hub's repositories; a model has no prefix
_BUCKET = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Place:
    """A location, taken apart.

    Attributes:
        scheme: ``file``, ``s3``, ``gs`` or ``hf``.
        path: of the folder, as its filesystem takes it: for ``s3`` and ``gs`` it begins with
            the bucket, for ``hf`` with ``datasets/owner/name``; no slash at its end.
    """

    scheme: str
    path: str

    @property
    def root(self) -> str:
        """The bucket, or the hub's repository without its version."""
        if self.scheme != "hf":
            return self.path.partition("/")[0]
        parts = self.path.partition("@")[0].split("/")
        return "/".join(parts[: 3 if parts[0] in _TYPES else 2])

    def __str__(self) -> str:
        """The path of a local folder, the URI of any other."""
        return self.path if self.scheme == "file" else f"{self.scheme}://{self.path}"


def parse(where: str | Path) -> Place:
    """Take a location apart; ``~`` is expanded in a local path.

    Raises:
        ConfigError: a scheme that is not understood, or a URI without a bucket or data set.
    """
    text = str(where).strip()
    if not text:
        raise ConfigError("the location of a folder is empty", hint=UNDERSTOOD)
    found = _SCHEME.fullmatch(text)
    if found is None:
        return Place("file", _local(text))
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    if scheme == "file":
        return Place("file", _from_file_uri(text, slashes, rest))
    if len(slashes) == 1 and scheme not in REMOTE:
        return Place("file", _local(text))  # a folder may have a colon in its name
    if scheme not in REMOTE:
        raise ConfigError(f"{scheme}:// is not understood", hint=UNDERSTOOD)
    if len(slashes) != 2:
        raise ConfigError(
            f"{text} needs two slashes after {scheme}:", hint=f"write {scheme}://{rest}"
        )
    path = rest.rstrip("/")
    _check(scheme, path)
    return Place(scheme, path)


def _local(text: str) -> str:
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise ConfigError(
            f"{text} names no home folder of this machine", hint="write the whole path"
        ) from error


def _from_file_uri(text: str, slashes: str, rest: str) -> str:
    """``file:/a``, ``file:///a`` and ``file://localhost/a`` are the same path."""
    if len(slashes) == 2:
        host, _, rest = rest.partition("/")
        if host != "localhost":
            raise ConfigError(f"{text} names no absolute path", hint=f"write file:///{host}/{rest}")
    return str(Path("/" + unquote(rest)))


def _check(scheme: str, path: str) -> None:
    first, *others = path.split("/")
    if scheme == "hf":
        if len(others) < (2 if first in _TYPES else 1) or not all(others):
            raise ConfigError(f"hf://{path} names no data set", hint=UNDERSTOOD)
        return
    # Neither is echoed: pyarrow's own URIs may hold a secret before an @ or behind a question mark.
    if "@" in first or "?" in path:
        raise ConfigError(
            f"a {scheme}:// location takes no credentials and no options",
            hint="give them as environment variables: docs/teacher-store.md lists them",
        )
    if not _BUCKET.fullmatch(first):
        raise ConfigError(f"{scheme}://{path} names no bucket", hint=UNDERSTOOD)
    if not all(others):
        raise ConfigError(
            f"{scheme}://{path} has an empty part between two slashes", hint="write one slash there"
        )
