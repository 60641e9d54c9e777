"""What an adapter's folder says about itself, read without torch: ``nexus.adapter/1``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexus_cli.errors import ArtifactError
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.model_dir import ADAPTER

FORMAT = "nexus.adapter/1"
TENSORS = "adapter.safetensors"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseIdentity(_Part):
    """The model that was converted: where it was, and :func:`~.model_dir.fingerprint` of it."""

    path: str
    fingerprint: str


class AdapterShape(_Part):
    """The sizes that its tensors have; all but the last two are the base's."""

    num_layers: int = Field(gt=0)
    num_experts: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_shared_experts: int = Field(gt=0)
    shared_intermediate_size: int = Field(gt=0)


class TensorsFile(_Part):
    """Identity of :data:`TENSORS`."""

    sha256: str
    bytes: int


class AdapterConfig(_Part):
    """The content of ``nexus_adapter.json``; it is written after the tensors.

    ``conversion`` is the ``conversion_metadata.json`` of the model that it was made from.
    """

    format: Literal["nexus.adapter/1"] = "nexus.adapter/1"
    base: BaseIdentity
    shape: AdapterShape
    tensors: TensorsFile
    conversion: dict[str, Any]
    environment: dict[str, str]


def write_config(path: Path, config: AdapterConfig) -> None:
    """Write ``config`` into the adapter's new folder ``path``."""
    (path / ADAPTER).write_text(config.model_dump_json(indent=2), encoding="utf-8")


def read_config(path: Path) -> AdapterConfig:
    """The config of the adapter in the folder ``path``.

    Raises:
        ArtifactError: it is missing, damaged, or of another format.
    """
    file = path / ADAPTER
    try:
        return AdapterConfig.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} is missing", hint="copy the adapter again, whole") from error
    except ValidationError as error:
        raise ArtifactError(
            f"{file}: not a {FORMAT} file",
            hint="give an adapter that nexus train --adapter or nexus convert --adapter wrote",
        ) from error


def identity_of(file: Path) -> TensorsFile:
    """Hash and measure a file of tensors."""
    return TensorsFile(sha256=sha256_file(file), bytes=file.stat().st_size)


def verify_tensors(path: Path, config: AdapterConfig) -> None:
    """Check that the tensors in the folder ``path`` are, byte for byte, those of ``config``.

    Raises:
        ArtifactError: the file is missing, truncated or changed.
    """
    file, hint = path / TENSORS, "copy the adapter again, whole"
    if not file.is_file():
        raise ArtifactError(f"{file} is missing", hint=hint)
    size = file.stat().st_size
    if size != config.tensors.bytes:
        raise ArtifactError(
            f"{file} has {size} bytes, and {ADAPTER} names {config.tensors.bytes}", hint=hint
        )
    if sha256_file(file) != config.tensors.sha256:
        raise ArtifactError(f"{file} is not the file whose sha256 {ADAPTER} names", hint=hint)
