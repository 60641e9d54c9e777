"""``nexus convert`` between the two forms of a converted model: whole, and as an adapter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.model.gpt_oss.adapter import (
    Adapter,
    apply_adapter,
    read_adapter,
    read_conversion,
    read_sizes,
    write_adapter,
)
from nexus_cli.core.model.gpt_oss.export import NEXUS_SHARD
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError
from nexus_cli.io import adapter_dir, console, hub, model_dir
from nexus_cli.io.hashing import sha256_json
from nexus_cli.io.shard_identity import shard_digest
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import share
from nexus_cli.pipeline.adapters import find_base, names_adapter, open_adapter
from nexus_cli.pipeline.capacity import free_disk, gib
from nexus_cli.pipeline.inputs import Artifact, model_input
from nexus_cli.pipeline.stage import stage

log = logging.getLogger(__name__)

MODEL = "nexus.model/1"


def to_model(
    config: ConvertConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Write the whole model that the adapter ``config.model`` makes of its base.

    Raises:
        ConfigError: the base is not there, or the settings are of a new shared expert.
        ArtifactError: the adapter is damaged, or the base is another model.
    """
    if given := config.start_settings:
        raise ConfigError(
            f"{config.model} is an adapter, which has its shared expert: {', '.join(given)} "
            "would have no effect",
            hint="leave that out, or convert the original model",
        )
    adapter = open_adapter(config.model)
    base = find_base(adapter, config.base)
    inputs = {
        "adapter": Artifact(adapter.path, adapter.digest),
        "base": Artifact(base, adapter.config.base.fingerprint),
    }
    if dry_run:
        _describe_model(config, workspace, adapter, base)
        return
    with stage(
        "convert", config, workspace, main="model", inputs=inputs, output=config.output, force=force
    ) as out:
        if out is None:
            return
        apply_adapter(out.main, base, adapter, link="copy" if config.copy_shards else "hard")
        out.add(out.main, format=MODEL)
        console.result(f"{out.main}: {adapter.name} on {base}")


def to_adapter(
    config: ConvertConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Write what Nexus added to the converted model or checkpoint ``config.model``, and push it.

    The model's base need not be there. An adapter is pushed as it is.

    Raises:
        ConfigError: it has no shared expert, or is an adapter already and not to be pushed.
        ArtifactError: it is damaged, or does not name its base.
        ResourceError: the hub does not answer or refuses.
    """
    if config.push_to_hub is not None:
        hub.require_writer()
    if names_adapter(config.model):
        _push_as_it_is(config, dry_run=dry_run)
        return
    if config.output is None:
        raise ConfigError("--adapter needs the adapter's folder, --output", hint="give --output")
    model = _trained(model_dir.resolve_model(config.model))
    place, _ = read_conversion(model.path)
    if dry_run:
        size = (model.path / NEXUS_SHARD).stat().st_size
        rows = [("make an adapter of", model.path), ("to be put on", place), *_pushed(config)]
        _describe(rows, size, config.output)
        return
    with stage(
        "convert",
        config,
        workspace,
        main="adapter",
        inputs={"model": model},
        output=config.output,
        force=force,
    ) as out:
        if out is not None:
            write_adapter(out.main, model.path)
            out.add(out.main, format=adapter_dir.FORMAT)
            size = adapter_dir.read_config(out.main).tensors.bytes
            console.result(f"{out.main}: {gib(size)}, to be put on {place}")
    if config.push_to_hub is not None:
        adapter = read_adapter(config.output.expanduser())
        share.push(adapter, config.push_to_hub, public=config.public)


def _push_as_it_is(config: ConvertConfig, *, dry_run: bool) -> None:
    if config.push_to_hub is None:
        raise ConfigError(
            f"{config.model} is an adapter already", hint="copy its folder, or give --push-to-hub"
        )
    if config.output is not None:
        raise ConfigError(
            f"{config.model} is an adapter already, and is pushed as it is",
            hint="leave out --output",
        )
    adapter = open_adapter(config.model)
    if dry_run:
        rows = [("push", adapter.name), ("size", gib(adapter.config.tensors.bytes))]
        console.result_table("nexus convert would", ("what", "value"), [*rows, *_pushed(config)])
        return
    share.push(adapter, config.push_to_hub, public=config.public)


def _trained(path: Path) -> Artifact:
    """A converted model by what an adapter is made of: links to a base that is gone do no harm."""
    read_sizes(path)
    if not (path / NEXUS_SHARD).is_file():
        raise ArtifactError(f"{path} lacks {NEXUS_SHARD}", hint="copy the model again, whole")
    if (problem := _problem(path)) is not None:
        log.warning("%s; the adapter is made of what was trained, and fits the original", problem)
    shard = shard_digest(path / NEXUS_SHARD)
    return Artifact(path, sha256_json({"config": model_dir.read_config(path), "trained": shard}))


def _problem(path: Path) -> str | None:
    """What is wrong with the linked base of a converted model, if anything is."""
    try:
        model_input(path)
    except ArtifactError as error:
        return str(error)
    return None


def _pushed(config: ConvertConfig) -> list[tuple[str, object]]:
    if config.push_to_hub is None:
        return []
    seen = "public" if config.public else "private, if it is new"
    return [("push to", f"{config.push_to_hub} ({seen})")]


def _describe_model(
    config: ConvertConfig, workspace: Workspace, adapter: Adapter, base: Path
) -> None:
    shards = {base / name for name in model_dir.weight_map(base).values()}
    base_bytes = sum(shard.stat().st_size for shard in shards)
    added = adapter.config.tensors.bytes
    _describe(
        [
            ("put", adapter.name),
            ("on", base),
            ("copy" if config.copy_shards else "link", gib(base_bytes)),
        ],
        added + (base_bytes if config.copy_shards else 0),
        config.output or workspace.stage_dir("convert") / "model",
    )


def _describe(rows: Sequence[tuple[str, object]], needed: int, target: Path) -> None:
    """Print the plan, and whether the disk holds ``needed`` bytes."""
    free = free_disk(target)
    last = [("write", f"{gib(needed)} of {gib(free)} free"), ("to", target)]
    console.result_table("nexus convert would", ("what", "value"), [*rows, *last])
    if needed > free:
        raise ResourceError(f"{target} has no room for {gib(needed)}", hint="use another --output")
