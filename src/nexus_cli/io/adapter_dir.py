"""What an adapter's folder says about itself, read without torch: ``nexus.adapter/2``."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nexus_cli.errors import ArtifactError
from nexus_cli.io import hub_cache, model_dir
from nexus_cli.io.base_identity import BaseIdentity, identity
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.model_dir import ADAPTER

FORMAT = "nexus.adapter/2"
FIRST_FORMAT = "nexus.adapter/1"  # its config held the path of the base
TENSORS = "adapter.safetensors"
LOCAL_BASE = "local_base.json"  # where the base is on this machine: the one file not to be shared


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterShape(_Part):
    """The sizes that its tensors have; all but the last two are the base's.

    They may come from anyone: the bounds, far above any model of the family, keep small what is
    computed of them before they are compared with the tensors.
    """

    num_layers: int = Field(gt=0, le=1024)
    num_experts: int = Field(gt=0, le=2**16)
    hidden_size: int = Field(gt=0, le=2**20)
    num_shared_experts: int = Field(gt=0, le=2**10)
    shared_intermediate_size: int = Field(gt=0, le=2**24)


class TensorsFile(_Part):
    """Identity of :data:`TENSORS`."""

    sha256: str
    bytes: int


class AdapterConfig(_Part):
    """The content of ``nexus_adapter.json``; it is written after the tensors.

    It names no place: neither ``base`` nor ``conversion``, which is the
    ``conversion_metadata.json`` of the model that it was made from, :func:`without_places`.
    ``nexus.adapter/1`` differs in that it did.
    """

    format: Literal["nexus.adapter/2"] = "nexus.adapter/2"
    base: BaseIdentity
    shape: AdapterShape
    tensors: TensorsFile
    conversion: dict[str, Any]
    environment: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _from_the_first_format(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("format") != FIRST_FORMAT:
            return value
        base, conversion = value.get("base"), value.get("conversion")
        named_so = isinstance(base, dict) and base.keys() == {"path", "fingerprint"}
        if base is None or not named_so or not isinstance(conversion, dict):
            raise ValueError("a base by path and fingerprint, and its conversion")
        named = identity(Path(str(base["path"])), str(base["fingerprint"]))
        return value | {
            "format": FORMAT,
            "base": named.model_dump(),
            "conversion": without_places(conversion | {"base": named.model_dump()}),
        }


def write_config(path: Path, config: AdapterConfig) -> None:
    """Write ``config`` into the adapter's new folder ``path``."""
    (path / ADAPTER).write_text(config.model_dump_json(indent=2), encoding="utf-8")


def read_config(path: Path) -> AdapterConfig:
    """The config of the adapter in the folder ``path``, of this format or the one before.

    Raises:
        ArtifactError: it is missing, damaged, or of another format.
    """
    file = path / ADAPTER
    try:
        return AdapterConfig.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} is missing", hint=_again(path)) from error
    except ValidationError as error:
        raise ArtifactError(
            f"{file}: not a {FORMAT} file",
            hint="give an adapter that nexus train --adapter or nexus convert --adapter wrote",
        ) from error


def write_local_base(path: Path, base: str) -> None:
    """Note in the adapter's folder ``path`` that its base lies at ``base`` on this machine."""
    text = json.dumps({"path": base}, indent=2)
    (path / LOCAL_BASE).write_text(text, encoding="utf-8")


def read_local_base(path: Path) -> Path | None:
    """Where the adapter in the folder ``path`` has its base on this machine, if it says so.

    Raises:
        ArtifactError: the note is damaged.
    """
    if (path / LOCAL_BASE).is_file():
        return Path(_noted(path / LOCAL_BASE))
    config = model_dir.read_json(path / ADAPTER)
    if config.get("format") != FIRST_FORMAT:
        return None
    return Path(str(config["base"]["path"]))


def _noted(file: Path) -> str:
    hint = "delete it, or give the base's folder with --base"
    try:
        base = model_dir.read_json(file).get("path")
    except ArtifactError as error:
        raise ArtifactError(str(error), hint=hint) from error
    if not isinstance(base, str):
        raise ArtifactError(f"{file} names no path", hint=hint)
    return base


def without_places(value: Any) -> Any:
    """A JSON value in which the paths of this machine are the names of files and folders alone."""
    if isinstance(value, dict):
        return {
            key: _name(entry) if key == "path" else without_places(entry)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [without_places(entry) for entry in value]
    if isinstance(value, str) and value.startswith(("/", "~", "\\\\", "file:")):
        return _name(value)
    return value


def _name(place: Any) -> Any:
    """The last part of a path, spelled as any system does."""
    if not isinstance(place, str):
        return without_places(place)
    return PureWindowsPath(PurePosixPath(place).name).name


def identity_of(file: Path) -> TensorsFile:
    """Hash and measure a file of tensors."""
    return TensorsFile(sha256=sha256_file(file), bytes=file.stat().st_size)


def verify_tensors(path: Path, config: AdapterConfig) -> None:
    """Check that the tensors in the folder ``path`` are, byte for byte, those of ``config``.

    Raises:
        ArtifactError: the file is missing, truncated or changed.
    """
    file, hint = path / TENSORS, _again(path)
    if not file.is_file():
        raise ArtifactError(f"{file} is missing", hint=hint)
    size = file.stat().st_size
    if size != config.tensors.bytes:
        raise ArtifactError(
            f"{file} has {size} bytes, and {ADAPTER} names {config.tensors.bytes}", hint=hint
        )
    if sha256_file(file) != config.tensors.sha256:
        raise ArtifactError(f"{file} is not the file whose sha256 {ADAPTER} names", hint=hint)


def _again(path: Path) -> str:
    found = hub_cache.repository_of(path)
    if found is None:
        return "copy the adapter again, whole"
    return f"run: hf download {found[0]} --revision {found[1]} --force-download"
