"""The record a stage leaves behind: what it read, what it wrote, and how."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexus_cli.errors import ArtifactError
from nexus_cli.io.atomic import write_atomic
from nexus_cli.io.hashing import sha256_file, sha256_json

FILENAME = "manifest.json"
RECORDED = ("nexus-cli", "torch", "transformers", "accelerate", "numpy", "safetensors")


class Output(BaseModel):
    """One file or folder that the stage wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    sha256: str
    bytes: int


class Manifest(BaseModel):
    """Written last: a stage without one did not finish.

    ``inputs`` are digests by role. Those that were read from the same workspace are also in
    ``sources``, as the :attr:`digest` that each stage's manifest had, so that a stage whose
    source was made again is known to be stale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["nexus.manifest/1"] = "nexus.manifest/1"
    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    sources: dict[str, str] = Field(default_factory=dict)
    outputs: dict[str, Output]
    main: str
    environment: dict[str, str] = Field(default_factory=dict)
    command: str = ""
    started: datetime | None = None
    finished: datetime | None = None

    @property
    def digest(self) -> str:
        """Identity of what the next stage reads, whatever settings made it.

        The main output's content; all outputs' where the main one is the folder around them.
        Reports and plots that lie beside it carry times and leave nothing stale.
        """
        if self.main in self.outputs:
            return self.outputs[self.main].sha256
        return sha256_json({name: output.sha256 for name, output in self.outputs.items()})


def read(path: Path) -> Manifest | None:
    """The manifest at ``path``, or ``None`` if the stage has not finished.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(
            f"{path}: not a nexus.manifest/1 file", hint="run its stage again with --force"
        ) from error


def is_whole(directory: Path, manifest: Manifest) -> bool:
    """Whether every output is there with its recorded size; contents are not read."""
    return all(
        (directory / name).exists() and size_of(directory / name) == output.bytes
        for name, output in manifest.outputs.items()
    )


def commit(path: Path, manifest: Manifest) -> None:
    """Write ``manifest``, after every output is in place."""
    write_atomic(path, manifest.model_dump_json(indent=2).encode())


def describe(path: Path, format: str) -> Output:
    """Hash and measure an output: a file's content, or a folder's file names and contents."""
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): _identity(file) for file in _files(path)}
        return Output(format=format, sha256=sha256_json(files), bytes=size_of(path))
    return Output(format=format, sha256=sha256_file(path), bytes=path.stat().st_size)


def size_of(path: Path) -> int:
    """Bytes in a file, or in all files of a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in _files(path))
    return path.stat().st_size


def environment() -> dict[str, str]:
    """Versions that a result may depend on."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in RECORDED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def command_line() -> str:
    """The command as a user could type it again."""
    return shlex.join(["nexus", *sys.argv[1:]])


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def _files(directory: Path) -> list[Path]:
    return sorted(
        file
        for file in directory.rglob("*")
        if file.is_file() and not file.name.endswith((".tmp", ".lock"))
    )


def _identity(file: Path) -> str:
    """Linked shards are hashed by their inode's size and time: their bytes are not ours."""
    status = file.stat()
    if status.st_nlink > 1 or file.is_symlink():
        return f"linked:{status.st_size}:{status.st_mtime_ns}"
    return sha256_file(file)
