"""What a model folder says about itself, read without loading it (and without torch)."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_cli import embedded
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io.hashing import sha256_json

EMBEDDED = "embedded"
BASE_TYPE = "gpt_oss"
NEXUS_TYPE = "nexus_gpt_oss"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "nexus_adapter.json"
SAMPLES = 16
SAMPLE_BYTES = 4096


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
        raise ConfigError(f"{path} has no config.json, so it is not a model folder")
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
        ArtifactError: no weights, a listed shard is missing, or the index names a file
            outside the folder.
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
            raise ArtifactError(
                f"{path} lacks the shard {name} that its index lists",
                hint="download it, or link it again if the folder that held it has moved",
            )
    return files


def read_header(shard: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        ArtifactError: the file is truncated or not safetensors.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ArtifactError(
                f"{shard} is not a safetensors file, or is truncated", hint="download it again"
            )
        try:
            header = dict(json.loads(file.read(length)))
            spans = (v["data_offsets"] for k, v in header.items() if k != "__metadata__")
            end = max((int(stop) for _, stop in spans), default=0)
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{shard} has a damaged header", hint="download it again"
            ) from error
    whole = 8 + length + end
    if size != whole:
        raise ArtifactError(
            f"{shard} is {'truncated' if size < whole else 'too long'}: {size} bytes of {whole}",
            hint="download it again",
        )
    return header


def fingerprint(path: Path) -> str:
    """Identity of a model's weights: config, shard headers, sizes, and samples of the bytes.

    Hashing all of the 120B model would take minutes for every command, so each shard gives
    its header and sixteen evenly spaced pages; other weights of the same shape differ in them.
    """
    shards = {name: _sample(path / name) for name in sorted(set(weight_map(path).values()))}
    return sha256_json({"config": read_config(path), "shards": shards})


def _sample(shard: Path) -> str:
    size = shard.stat().st_size
    digest = hashlib.sha256(json.dumps([size, read_header(shard)], sort_keys=True).encode())
    with shard.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, (size - SAMPLE_BYTES) * number // (SAMPLES - 1)))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
