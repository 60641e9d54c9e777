"""A folder or file on any filesystem that pyarrow opens, with errors that a user can act on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from nexus_cli.errors import ArtifactError
from nexus_cli.io.filesystems import failures, open_filesystem
from nexus_cli.io.remote_errors import explain, missing, missing_root
from nexus_cli.io.uri import parse

PIECE_BYTES = 8 * 2**20  # one request an object store


@dataclass(frozen=True)
class Location:
    """A folder or file; nothing is read until a method is called.

    Attributes:
        filesystem: that holds it; not to be used in a process forked after it was opened.
        path: in that filesystem.
        shown: as the user wrote it, for messages.
        local: path on this machine, or None where it is elsewhere.
        scheme: ``file``, ``s3``, ``gs`` or ``hf``.
    """

    filesystem: fs.FileSystem
    path: str
    shown: str
    local: Path | None = None
    scheme: str = "file"

    def __truediv__(self, name: str) -> Location:
        """The file or folder ``name`` inside this folder; ``name`` may have several parts.

        Raises:
            ArtifactError: ``name`` leads out of this folder, as only a corrupt list of files does.
        """
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0].startswith("/"):
            raise ArtifactError(
                f"{self.shown} names a file outside itself: {name!r}", hint="write the folder again"
            )
        inside = "/".join(parts)
        return replace(
            self,
            path=f"{self.path.rstrip('/')}/{inside}",
            shown=f"{self.shown.rstrip('/')}/{inside}",
            local=None if self.local is None else self.local / inside,
        )

    def is_file(self) -> bool:
        """Whether it is a file. Raises ResourceError if its server cannot be asked."""
        return bool(self._info().type == fs.FileType.File)

    def is_dir(self) -> bool:
        """Whether it is a folder. Raises ResourceError if its server cannot be asked.

        In an object store, a folder is a prefix under which there is an object.
        """
        return bool(self._info().type == fs.FileType.Directory)

    def size(self) -> int:
        """Bytes of a file.

        Raises:
            ArtifactError: there is no such file.
            ResourceError: it cannot be read.
        """
        info = self._info()
        if info.type != fs.FileType.File:
            raise missing(self.shown)
        return int(info.size)

    def sizes(self) -> dict[str, int]:
        """Names and bytes of the files in a folder, asked for at once; none if it is not there.

        Raises:
            ResourceError: it cannot be read.
        """
        with reading(self):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return {info.base_name: int(info.size) for info in found if info.type == fs.FileType.File}

    def open(self) -> pa.NativeFile:
        """The file for random access, mapped into memory where it is local.

        Reads of what it returns may fail too: do them inside :func:`reading`.

        Raises:
            ArtifactError: there is no such file.
            ResourceError: it cannot be read.
        """
        with reading(self):
            if self.local is not None:
                return pa.memory_map(self.path)
            return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        """All of a file.

        Raises:
            ArtifactError: there is no such file.
            ResourceError: it cannot be read.
        """
        with reading(self), self.open() as file:
            return bytes(file.read())

    def sha256(self) -> str:
        """Hex digest of the file's bytes, of which ``PIECE_BYTES`` are held at a time.

        Raises:
            ArtifactError: there is no such file.
            ResourceError: it cannot be read.
        """
        digest = hashlib.sha256()
        with reading(self), self.open() as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def _exists(self) -> bool:
        return bool(self._info().type != fs.FileType.NotFound)

    def _info(self) -> Any:
        with reading(self):
            return self.filesystem.get_file_info(self.path)


def locate(where: str | Path) -> Location:
    """Open the filesystem that holds ``where``; a server is asked once whether it lets us in.

    A folder that is not there is no error here: :meth:`Location.is_dir` tells.

    Args:
        where: a path (``~`` is expanded), ``file://``, ``s3://``, ``gs://`` or ``hf://``.

    Raises:
        ConfigError: a location, or an endpoint in the environment, that is not understood.
        ArtifactError: there is no such bucket.
        ResourceError: the server does not answer or refuses the credentials, or a package is
            missing.
    """
    place, shown = parse(where), str(where).strip()
    if place.scheme == "file":
        local = Path(place.path).absolute()
        return Location(fs.LocalFileSystem(), str(local), shown, local)
    with _explained(shown, place.scheme):
        filesystem = open_filesystem(place)
    location = Location(filesystem, place.path, shown, scheme=place.scheme)
    if not location._exists():
        root = replace(location, path=place.root)
        if not root._exists():
            raise missing_root(shown, place.scheme, place.root)
    return location


@contextmanager
def reading(location: Location) -> Iterator[None]:
    """Turn what reading from ``location`` raises into an error for the user.

    What pyarrow says of damaged contents (``ArrowInvalid``) passes through.

    Raises:
        ArtifactError: there is no such file.
        ResourceError: it cannot be read.
    """
    with _explained(location.shown, location.scheme):
        yield


@contextmanager
def _explained(shown: str, scheme: str) -> Iterator[None]:
    expected = failures(scheme)
    try:
        yield
    except expected as error:
        if isinstance(error, pa.ArrowInvalid):
            raise  # it is of what was read, a damaged file, not of the store
        raise explain(error, shown, scheme) from error
