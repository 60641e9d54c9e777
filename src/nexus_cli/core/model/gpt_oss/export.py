"""Write a complete model folder at the price of its new tensors: everything else is linked."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from nexus_cli.core.model.gpt_oss import modeling_nexus_gpt_oss as modeling
from nexus_cli.core.model.gpt_oss.shard import TensorStream, write_shard
from nexus_cli.core.model.gpt_oss.surgery import ROUTER
from nexus_cli.errors import ArtifactError, ResourceError
from nexus_cli.io import console, model_dir
from nexus_cli.io.atomic import atomic_directory

log = logging.getLogger(__name__)

# transformers reads shards in the order of their names, and the last one to hold a key wins.
NEXUS_SHARD = "nexus-trained.safetensors"
METADATA = "conversion_metadata.json"
MODELING = Path(modeling.__file__)
LICENCES = ("LICENSE", "NOTICE", "USAGE_POLICY")
WRITTEN = {"config.json", model_dir.INDEX, METADATA, MODELING.name}
LinkMode = Literal["hard", "copy"]


@dataclass(frozen=True)
class SharedExpertShape:
    """What a converted config says beyond its base's."""

    num_shared_experts: int
    intermediate_size: int


def write_model_directory(
    target: Path,
    base: Path,
    tensors: Mapping[str, Tensor] | TensorStream,
    *,
    shape: SharedExpertShape | None = None,
    metadata: Mapping[str, Any] | None = None,
    link: LinkMode = "hard",
) -> None:
    """Write ``tensors`` as one new shard beside the base's own, which are linked.

    The folder appears whole or not at all. It loads in stock transformers with
    ``trust_remote_code=True``, since the modelling file travels with it.

    Args:
        target: the new folder. A Nexus model already there is replaced.
        base: a GPT-OSS folder, or one that this function wrote.
        tensors: the new shard; a stream is written as its tensors are made. They win over
            tensors of the base of the same name. What else the new shard of ``base`` holds, such
            as a router trained before, stays.
        shape: of the shared expert; the base's own by default.
        metadata: content of ``conversion_metadata.json``; the base's own by default.
        link: ``hard`` links (symbolic where those are refused, which is logged), or ``copy``.

    Raises:
        ArtifactError: ``target`` holds something that is not a Nexus model, or the base's
            shards would win over the new one.
        ResourceError: the disk is full, or cannot be written.
    """
    _check_replaceable(target)
    kept = {key: name for key, name in model_dir.weight_map(base).items() if name != NEXUS_SHARD}
    if late := [name for name in set(kept.values()) if name >= NEXUS_SHARD]:
        raise ArtifactError(f"{base}: the shard {late[0]} sorts after {NEXUS_SHARD}")
    with disk_errors(target), atomic_directory(target) as folder:
        renamed = _place_shards(folder, base, sorted(set(kept.values())), link)
        stored = merged_tensors(base, tensors)
        if stored.layout:
            write_shard(folder / NEXUS_SHARD, stored)
        placed = {key: renamed[name] for key, name in kept.items()}
        _write_index(folder, placed | dict.fromkeys(stored.layout, NEXUS_SHARD))
        _place_companions(folder, base, metadata)
        _write_config(folder, base, shape)  # last: without it what a kill leaves is no model


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Run a block that writes ``target``.

    Raises:
        ResourceError: the disk is full, or cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write {target}: {error.strerror or error}",
            hint="free some disk space, or choose another --output",
        ) from error


def merged_tensors(base: Path, tensors: Mapping[str, Tensor] | TensorStream) -> TensorStream:
    """``tensors``, and what else the new shard of the folder ``base`` holds.

    Raises:
        ArtifactError: that shard is damaged.
    """
    new = tensors if isinstance(tensors, TensorStream) else TensorStream.of(tensors)
    old = {key: tensor for key, tensor in nexus_tensors(base).items() if key not in new.layout}
    return TensorStream(old | dict(new.layout), chain(old.items(), new.tensors))


def nexus_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the shard that Nexus wrote into a model folder; none for a base model.

    Raises:
        ArtifactError: the shard is damaged.
    """
    shard = path / NEXUS_SHARD
    if not shard.is_file():
        return {}
    model_dir.read_header(shard)
    try:
        return load_file(shard)
    except SafetensorError as error:
        raise ArtifactError(f"cannot read {shard}: {error}", hint="copy it again") from error


def original_routers(path: Path) -> dict[str, Tensor]:
    """The original model's routers, where the new shard holds trained ones over them.

    Their bytes are still in the linked shards: a key of the new shard wins, and rewrites nothing.
    """
    files = model_dir.weight_map(path)
    trained = {key for key, name in files.items() if name == NEXUS_SHARD and ROUTER.fullmatch(key)}
    found: dict[str, Tensor] = {}
    for name in sorted(set(files.values()) - {NEXUS_SHARD}) if trained else ():
        with safe_open(path / name, framework="pt") as shard:
            found |= {key: shard.get_tensor(key) for key in trained.intersection(shard.keys())}
    return found


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    config = target / "config.json"
    if config.is_file() and model_dir.read_config(target).get("model_type") == model_dir.NEXUS_TYPE:
        return
    raise ArtifactError(
        f"{target} exists and is not a model that nexus wrote", hint="choose another --output"
    )


def _place_shards(folder: Path, base: Path, names: list[str], link: LinkMode) -> dict[str, str]:
    """Put the base's shards into ``folder``; returns their new names.

    A lone ``model.safetensors`` is renamed: transformers would load it and not look at the
    index.
    """
    renamed = {}
    for name in console.progress(names, "copying shards") if link == "copy" else names:
        renamed[name] = "model-00001-of-00001.safetensors" if name == model_dir.SINGLE else name
        _place(base / name, folder / renamed[name], link)
    return renamed


def _place(source: Path, target: Path, link: LinkMode) -> None:
    source = source.resolve()  # a hub cache is made of relative symbolic links
    if link == "copy":
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        log.warning("no hard link to %s here: made a symbolic one, do not move it", source)
        target.symlink_to(source)


def _write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    total = 0
    for name in set(weight_map.values()):
        header = model_dir.read_header(folder / name)
        spans = (header[key]["data_offsets"] for key in header if weight_map.get(key) == name)
        total += sum(end - start for start, end in spans)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / model_dir.INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_config(folder: Path, base: Path, shape: SharedExpertShape | None) -> None:
    config = model_dir.read_config(base)
    config.pop("quantization_config", None)  # its loader would replace our experts
    module = MODELING.stem
    config |= {
        "model_type": model_dir.NEXUS_TYPE,
        "architectures": ["NexusGptOssForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.NexusGptOssConfig",
            "AutoModelForCausalLM": f"{module}.NexusGptOssForCausalLM",
        },
        "experts_storage": "mxfp4",
    }
    if shape is not None:
        config["num_shared_experts"] = shape.num_shared_experts
        config["shared_expert_intermediate_size"] = shape.intermediate_size
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _place_companions(folder: Path, base: Path, metadata: Mapping[str, Any] | None) -> None:
    """Tokenizer, chat template, generation config, licence: whatever lies beside the weights."""
    shutil.copyfile(MODELING, folder / MODELING.name)
    if metadata is not None:
        (folder / METADATA).write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    elif (base / METADATA).is_file():
        shutil.copyfile(base / METADATA, folder / METADATA)
    for file in sorted(base.iterdir()):
        wanted = file.suffix in {".json", ".jinja", ".model", ".txt"} or file.name.startswith(
            LICENCES
        )
        if file.is_file() and wanted and file.name not in WRITTEN | {"training_report.json"}:
            shutil.copyfile(file, folder / file.name)  # a user may edit these
