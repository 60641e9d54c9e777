"""Adapters: what Nexus added to a model, without the model; and a whole model again."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from nexus_cli.core.model.gpt_oss.export import (
    LICENCES,
    METADATA,
    LinkMode,
    SharedExpertShape,
    disk_errors,
    merged_tensors,
    write_model_directory,
)
from nexus_cli.core.model.gpt_oss.shard import write_shard
from nexus_cli.core.model.gpt_oss.surgery import ROUTER, SHARED_EXPERT
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import adapter_dir, manifest, model_dir
from nexus_cli.io.adapter_dir import AdapterConfig, AdapterShape
from nexus_cli.io.atomic import atomic_directory
from nexus_cli.io.base_identity import BaseIdentity, base_record, identity
from nexus_cli.io.hashing import sha256_json

Layout = dict[str, tuple[str, list[int]]]  # a tensor's dtype, as safetensors spells it, and shape


@dataclass(frozen=True)
class Adapter:
    """A whole adapter on disk, its tensors verified.

    Attributes:
        path: its folder.
        config: what it says about itself.
        name: as the user gave it, for messages.
    """

    path: Path
    config: AdapterConfig
    name: str

    @property
    def digest(self) -> str:
        """Identity of the model that it makes of its base, wherever the two are."""
        base, tensors = self.config.base.fingerprint, self.config.tensors.sha256
        return sha256_json({"base": base, "tensors": tensors})


def write_adapter(target: Path, model: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write what Nexus added to ``model``: shared experts, gates, and routers that trained.

    The folder appears whole or not at all. The model's base need not be there.

    Args:
        target: the new folder. An adapter already there is replaced.
        model: a converted folder or a checkpoint.
        tensors: bf16, the gates fp32; they win over the model's own of the same name.

    Raises:
        ConfigError: the model has no shared expert.
        ArtifactError: ``target`` holds something that is not an adapter, the model does not
            name its base, or its shard is not what Nexus writes.
        ResourceError: the disk is full, or cannot be written.
    """
    _check_replaceable(target)
    shape, (place, conversion) = read_sizes(model), read_conversion(model)
    base = _identity(place, conversion["base"])
    with disk_errors(target), atomic_directory(target) as folder:
        file = folder / adapter_dir.TENSORS
        write_shard(file, merged_tensors(model, tensors or {}))
        _check_layout(model, file, shape)
        for licence in sorted(model.iterdir()):
            if licence.name.startswith(LICENCES) and licence.is_file():
                shutil.copyfile(licence, folder / licence.name)
        config = AdapterConfig(
            base=base,
            shape=shape,
            tensors=adapter_dir.identity_of(file),
            conversion=adapter_dir.without_places(conversion | {"base": base.model_dump()}),
            environment=manifest.environment(),
        )
        adapter_dir.write_local_base(folder, str(place))
        adapter_dir.write_config(folder, config)


def read_adapter(path: Path, name: str | None = None) -> Adapter:
    """Open an adapter and verify its tensors; they are not loaded.

    Args:
        path: its folder.
        name: what messages call it; by default the folder.

    Raises:
        ArtifactError: its config or its tensors are missing or damaged, or are not what Nexus
            trains in a model of the sizes that the config names.
    """
    config = adapter_dir.read_config(path)
    adapter_dir.verify_tensors(path, config)
    _check_layout(path, path / adapter_dir.TENSORS, config.shape)
    return Adapter(path, config, name or str(path))


def apply_adapter(target: Path, base: Path, adapter: Adapter, *, link: LinkMode = "hard") -> None:
    """Write the whole model that ``adapter`` makes of ``base``, whose shards are linked.

    The weights and the config are those of the model that the adapter was made from; tokenizer,
    template and generation config are the base's.

    Args:
        target: the new folder. A Nexus model already there is replaced.
        base: the original model. A converted one holds the same bytes, but not their identity.
        adapter: as :func:`read_adapter` gives it.
        link: as in :func:`~nexus_cli.core.model.gpt_oss.export.write_model_directory`.

    Raises:
        ArtifactError: ``base`` is another model, or ``target`` holds something that is not a
            Nexus model.
        ResourceError: the disk is full, or cannot be written.
    """
    require_base(base, adapter)
    sizes = adapter.config.shape
    found = base_record(base, adapter.config.base.fingerprint)
    write_model_directory(
        target,
        base,
        load_file(adapter.path / adapter_dir.TENSORS),
        shape=SharedExpertShape(sizes.num_shared_experts, sizes.shared_intermediate_size),
        metadata=adapter.config.conversion | {"base": found},
        link=link,
    )


def require_base(base: Path, adapter: Adapter) -> None:
    """Refuse to put ``adapter`` on any other model than its own.

    Raises:
        ArtifactError: ``base`` is another model.
    """
    if not is_base(base, adapter):
        wanted = adapter.config.base
        revision = f" at revision {wanted.revision}" if wanted.revision else ""
        raise ArtifactError(
            f"{base} is not the model that {adapter.name} was made from",
            hint=f"that is {wanted.name}{revision}, with the fingerprint "
            f"{wanted.fingerprint[:12]}...: give its folder with --base",
        )


def is_base(base: Path, adapter: Adapter) -> bool:
    """Whether ``adapter`` was made from ``base``, by sizes and then by fingerprint.

    Raises:
        ArtifactError: ``base`` is damaged.
    """
    mine, theirs = adapter.config.shape, model_dir.read_shape(base)
    same_sizes = all(
        getattr(mine, name) == getattr(theirs, name)
        for name in ("num_layers", "num_experts", "hidden_size")
    )
    return same_sizes and model_dir.fingerprint(base) == adapter.config.base.fingerprint


def read_conversion(model: Path) -> tuple[Path, dict[str, Any]]:
    """Where a converted model says that its base is, and all of its conversion metadata.

    Raises:
        ArtifactError: the model does not say what it was made from.
    """
    hint = "convert the original model again, or leave out --adapter"
    if not (model / METADATA).is_file():
        raise ArtifactError(f"{model} does not name its base: no {METADATA}", hint=hint)
    conversion = model_dir.read_json(model / METADATA)
    try:
        place = Path(conversion["base"]["path"])
        _identity(place, conversion["base"])
    except (KeyError, TypeError, ValidationError) as error:
        raise ArtifactError(f"{model / METADATA} does not name the base", hint=hint) from error
    return place, conversion


def _identity(place: Path, recorded: Mapping[str, Any]) -> BaseIdentity:
    """The base's; a model converted by a version that recorded no name has it of its path."""
    if "name" not in recorded:
        return identity(place, recorded["fingerprint"])
    return BaseIdentity(**{name: recorded.get(name) for name in BaseIdentity.model_fields})


def read_sizes(model: Path) -> AdapterShape:
    """The sizes that an adapter of ``model`` has.

    Raises:
        ConfigError: the model has no shared expert.
        ArtifactError: a size is none that an adapter may have.
    """
    shape = model_dir.read_shape(model)
    if not shape.num_shared_experts:
        raise ConfigError(
            f"{model} has no shared expert, so there is nothing to make an adapter of",
            hint=f"run: nexus convert --input {model} --output <folder>",
        )
    sizes = {name: getattr(shape, name) for name in AdapterShape.model_fields}
    try:
        return AdapterShape(**sizes)
    except ValidationError as error:
        wrong = error.errors()[0]["loc"][0]
        raise ArtifactError(
            f"{model / 'config.json'} has a size that no adapter has: {wrong} {sizes[str(wrong)]}",
            hint="convert the original model again",
        ) from error


def _check_layout(owner: Path, file: Path, sizes: AdapterShape) -> None:
    """Names on the allow-list, for every layer, in the dtypes and shapes that ``sizes`` give."""
    header = model_dir.read_header(file)
    found: Layout = {
        name: (entry["dtype"], entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    routers = {match[1] for name in found if (match := ROUTER.fullmatch(name))}
    wanted = _layout(sizes, routers) if sizes.num_layers <= len(found) else {}
    if foreign := [n for n in found if not (SHARED_EXPERT.fullmatch(n) or ROUTER.fullmatch(n))]:
        problem = f"holds {foreign[0]}, which Nexus does not train"
    elif not wanted:
        problem = f"holds {len(found)} tensors, too few for {sizes.num_layers} layers"
    elif missing := sorted(wanted.keys() - found.keys()):
        problem = f"lacks the tensor {missing[0]}"
    elif extra := sorted(found.keys() - wanted.keys()):
        problem = f"holds {extra[0]}, and has {sizes.num_layers} layers"
    elif other := sorted(name for name in wanted if found[name] != wanted[name]):
        problem = f"holds {other[0]} as {_told(found[other[0]])}, not {_told(wanted[other[0]])}"
    else:
        return
    raise ArtifactError(f"{owner} {problem}", hint="make the adapter again from its model")


def _layout(sizes: AdapterShape, routers: Collection[str]) -> Layout:
    """Every tensor of an adapter; the ``routers``' weights train in every layer or in none.

    So do their biases, with the weights or alone.
    """
    width, hidden = sizes.shared_intermediate_size, sizes.hidden_size
    layer: Layout = {"shared_expert.output_gate": ("F32", [1])}
    for name, rows, columns in (
        ("gate_proj", width, hidden),
        ("up_proj", width, hidden),
        ("down_proj", hidden, width),
    ):
        layer[f"shared_expert.{name}.weight"] = ("BF16", [rows, columns])
        layer[f"shared_expert.{name}.bias"] = ("BF16", [rows])
    if "weight" in routers:
        layer["router.weight"] = ("BF16", [sizes.num_experts, hidden])
    if "bias" in routers:
        layer["router.bias"] = ("BF16", [sizes.num_experts])
    return {
        f"model.layers.{number}.mlp.{name}": stored
        for number in range(sizes.num_layers)
        for name, stored in layer.items()
    }


def _told(stored: tuple[str, list[int]]) -> str:
    return f"{stored[0]} {stored[1]}"


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if model_dir.is_adapter(target):
        adapter_dir.read_config(target)  # of PEFT there are files of the same name
        return
    raise ArtifactError(
        f"{target} exists and is not an adapter that nexus wrote", hint="choose another --output"
    )
