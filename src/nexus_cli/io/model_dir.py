"""What a model folder says about itself, read without loading it (and without torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_cli import embedded
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io.hashing import sha256_json
from nexus_cli.io.shard_header import read_header as read_header  # a model folder's readers use it
from nexus_cli.io.shard_identity import shard_digest

EMBEDDED = "embedded"
BASE_TYPE = "gpt_oss"
NEXUS_TYPE = "nexus_gpt_oss"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "nexus_adapter.json"
CONVERSION = "conversion_metadata.json"
TRAINED = "nexus-trained.safetensors"


@dataclass(frozen=True)
class ModelShape:
    """The sizes that Nexus needs, of any member of the family."""

    model_type: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_shared_experts: int
    shared_intermediate_size: int

    @property
    def shared_parameters(self) -> int:
        """Parameters that the shared experts add: three matrices, three biases and a gate."""
        width, hidden = self.shared_intermediate_size, self.hidden_size
        per_layer = 3 * width * hidden + 2 * width + hidden + 1
        return self.num_shared_experts * self.num_layers * per_layer


def resolve_model(name: str | Path) -> Path:
    """The folder of a model: ``embedded``, or a path.

    Raises:
        ConfigError: there is no such folder, or it is no model.
    """
    if str(name).startswith("hf://"):
        repository, at, revision = str(name).removeprefix("hf://").partition("@")
        wanted = f"{repository} --revision {revision}" if at else repository
        raise ConfigError(
            f"{name} is no model folder: of the hub, adapters alone are read",
            hint=f"run: hf download {wanted}, and give the folder that it prints",
        )
    path = embedded.MODEL_DIR if str(name) == EMBEDDED else Path(name).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"there is no model folder {path}",
            hint="give the path of a downloaded GPT-OSS checkpoint, or the word 'embedded'",
        )
    if is_adapter(path):
        raise ConfigError(
            f"{path} is an adapter, not a whole model",
            hint=f"run: nexus convert --input {path} --output <folder>",
        )
    if not is_model(path):
        raise ConfigError(
            f"{path} has no config.json, so it is not a model folder",
            hint="give a downloaded model's, a converted one's or a checkpoint's own folder",
        )
    return path.resolve()


def is_model(path: Path) -> bool:
    """Whether ``path`` is a model folder by its ``config.json``; nothing in it is read."""
    return (path / "config.json").is_file()


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is an adapter's folder by its ``nexus_adapter.json``; nothing is read."""
    return (path / ADAPTER).is_file() and not is_model(path)


def read_config(path: Path) -> dict[str, Any]:
    """The model's ``config.json``."""
    return read_json(path / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ArtifactError: the file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds no JSON object")
    return value


def read_shape(path: Path) -> ModelShape:
    """Sizes from ``config.json``.

    Raises:
        ArtifactError: the model is not of the GPT-OSS family, or a size is missing.
    """
    config = read_config(path)
    kind = config.get("model_type")
    if kind not in (BASE_TYPE, NEXUS_TYPE):
        raise ArtifactError(
            f"{path} is a '{kind}' model; Nexus works on GPT-OSS",
            hint="use openai/gpt-oss-20b, openai/gpt-oss-120b, or a model that nexus converted",
        )
    try:
        return ModelShape(
            model_type=kind,
            num_layers=config["num_hidden_layers"],
            num_experts=config["num_local_experts"],
            top_k=config.get("num_experts_per_tok") or config["experts_per_token"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            num_shared_experts=config.get("num_shared_experts", 0),
            shared_intermediate_size=config.get("shared_expert_intermediate_size")
            or config["intermediate_size"],
        )
    except KeyError as error:
        raise ArtifactError(f"{path / 'config.json'} has no {error}") from error


def weight_map(path: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor.

    Raises:
        ArtifactError: no weights, a listed shard is missing or its link leads nowhere, or the
            index names a file outside the folder.
    """
    if (path / INDEX).is_file():
        listed = read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ArtifactError(
                f"{path / INDEX} has no weight_map",
                hint="use the index that was published with the shards",
            )
        files = {str(key): str(name) for key, name in listed.items()}
    elif (path / SINGLE).is_file():
        files = {key: SINGLE for key in read_header(path / SINGLE) if key != "__metadata__"}
    else:
        raise ArtifactError(
            f"{path} has no safetensors weights", hint="download the model's *.safetensors files"
        )
    for name in sorted(set(files.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise ArtifactError(
                f"{path / INDEX} points outside its folder: {name!r}",
                hint="use the index that was published with the shards",
            )
        if not (path / name).is_file():
            raise _lacking(path, name)
    return files


def require_links(path: Path) -> None:
    """Refuse a converted folder whose links to its base lead nowhere.

    Raises:
        ArtifactError: a shard is a symbolic link to a file that is not there.
    """
    for shard in sorted(path.glob("*.safetensors")):
        if shard.is_symlink() and not shard.exists():
            raise _lacking(path, shard.name)


def _lacking(path: Path, name: str) -> ArtifactError:
    """The error for a shard of ``path`` that is not there, or linked to where none is."""
    if not (path / name).is_symlink():
        return ArtifactError(
            f"{path} lacks the shard {name} that its index lists", hint="download it again"
        )
    target = path / (path / name).readlink()
    if not (path / CONVERSION).is_file():
        return ArtifactError(
            f"{path / name} is a link to {target}, which is not there", hint="download it again"
        )
    return ArtifactError(
        f"the base of {path} has moved: {name} is a link to {target}, which is not there",
        hint=f"move it back, or {_relink(path)}",
    )


def fingerprint(path: Path) -> str:
    """Identity of a model's weights: SHA-256, hex, of its config and its shards' digests.

    What a digest takes of a shard, and what it cannot see: :mod:`~nexus_cli.io.shard_identity`.

    Raises:
        ArtifactError: a shard is missing or damaged, or is not the one that was converted.
    """
    shards = shard_digests(path)
    _require_unchanged(path, shards)
    return sha256_json({"config": read_config(path), "shards": shards})


def shard_digests(path: Path) -> dict[str, str]:
    """What :func:`fingerprint` takes of each shard, by its name: a SHA-256, hex.

    Raises:
        ArtifactError: a shard is missing or damaged.
    """
    return {name: shard_digest(path / name) for name in sorted(set(weight_map(path).values()))}


def _require_unchanged(path: Path, shards: Mapping[str, str]) -> None:
    """Refuse a converted folder if its shards, which may be links, are other ones by now."""
    if not (path / CONVERSION).is_file():
        return
    base = read_json(path / CONVERSION).get("base")
    recorded = base.get("shards") if isinstance(base, dict) else None
    if not isinstance(base, dict) or not isinstance(recorded, dict):
        return  # converted by a version that did not record them
    for name, digest in shards.items():
        # A lone shard has another name in the converted folder.
        expected = recorded.get(name, recorded.get(SINGLE))
        if name != TRAINED and expected is not None and expected != digest:
            raise ArtifactError(
                f"the base of {path} has changed since it was converted: {name}, which was of "
                f"{base.get('path') or base.get('name')}, holds other bytes",
                hint=f"put the original's bytes back, or {_relink(path)}",
            )


def _relink(path: Path) -> str:
    """What to type where a converted folder lost its base and another copy of that is there."""
    if not (path / TRAINED).is_file():
        return "convert the original model again"
    return (
        f"run: nexus convert --adapter --input {path} --output ADAPTER; "
        "then: nexus convert --input ADAPTER --base BASE --output MODEL"
    )
