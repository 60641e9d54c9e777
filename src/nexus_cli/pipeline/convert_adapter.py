"""``nexus convert`` between the two forms of a converted model: whole, and as an adapter."""

from __future__ import annotations

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
from nexus_cli.errors import ConfigError, ResourceError
from nexus_cli.io import adapter_dir, console, model_dir
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.adapters import find_base
from nexus_cli.pipeline.capacity import free_disk, gib
from nexus_cli.pipeline.inputs import Artifact, model_input
from nexus_cli.pipeline.stage import stage

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
    adapter = read_adapter(Path(config.model).expanduser())
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
        console.result(f"{out.main}: {adapter.path} on {base}")


def to_adapter(
    config: ConvertConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Write what Nexus added to the converted model or checkpoint ``config.model``.

    Raises:
        ConfigError: it has no shared expert, or is an adapter already.
        ArtifactError: it is damaged, or does not name its base.
    """
    assert config.output is not None  # the config asks for it
    if model_dir.is_adapter(Path(config.model).expanduser()):
        raise ConfigError(f"{config.model} is an adapter already", hint="copy its folder")
    model = model_input(config.model)
    read_sizes(model.path)  # before the base is missed: an original model names none
    base, _ = read_conversion(model.path)
    if dry_run:
        size = (model.path / NEXUS_SHARD).stat().st_size
        rows = [("make an adapter of", model.path), ("to be put on", base.path)]
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
        if out is None:
            return
        write_adapter(out.main, model.path)
        out.add(out.main, format=adapter_dir.FORMAT)
        size = adapter_dir.read_config(out.main).tensors.bytes
        console.result(f"{out.main}: {gib(size)}, to be put on {base.path}")


def _describe_model(
    config: ConvertConfig, workspace: Workspace, adapter: Adapter, base: Path
) -> None:
    shards = {base / name for name in model_dir.weight_map(base).values()}
    base_bytes = sum(shard.stat().st_size for shard in shards)
    added = adapter.config.tensors.bytes
    _describe(
        [
            ("put", adapter.path),
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
