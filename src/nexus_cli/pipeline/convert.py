"""Stage ``convert``: a checkpoint and chosen experts in, a model with a shared expert out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.model.gpt_oss import initialise
from nexus_cli.core.model.gpt_oss.export import SharedExpertShape, write_model_directory
from nexus_cli.core.model.gpt_oss.slices import ExpertReader, ExpertWeights, open_experts
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError
from nexus_cli.io import console, manifest, model_dir
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.pca_stats import PcaStats, load_pca_stats
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert_adapter
from nexus_cli.pipeline.adapters import require_use
from nexus_cli.pipeline.capacity import free_disk, gib
from nexus_cli.pipeline.inputs import Artifact, model_input, stage_input
from nexus_cli.pipeline.stage import stage

log = logging.getLogger(__name__)

FORMAT = "nexus.model/1"
BYTES_PER_WEIGHT = 2  # bfloat16


def run(
    config: ConvertConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Write ``convert/model/``: the original's shards, linked, and one new shard beside them.

    An adapter comes out as the whole model that it makes of its base; with ``config.adapter`` a
    converted model goes out as an adapter.

    Raises:
        ConfigError: the model has a shared expert already, or more experts are asked for than
            the statistics name.
        ArtifactError: the statistics are of another model.
    """
    console.configure()
    require_use(config.base, config.model)
    if config.adapter:
        convert_adapter.to_adapter(config, workspace, force=force, dry_run=dry_run)
        return
    if model_dir.is_adapter(Path(config.model).expanduser()):
        convert_adapter.to_model(config, workspace, force=force, dry_run=dry_run)
        return
    model = model_input(config.model)
    shape = model_dir.read_shape(model.path)
    if shape.num_shared_experts:
        raise ConfigError(
            f"{model.path} has a shared expert already",
            hint="convert the original model, or train this one as it is",
        )
    inputs = {"model": model}
    choice = None
    if config.needs_stats:
        inputs["pca"] = stage_input(workspace, "pca", config.pca_stats)
        choice = _choice(config, inputs["pca"], model, shape)
    if dry_run:
        _describe(config, workspace, model, shape)
        return
    with stage(
        "convert", config, workspace, main="model", inputs=inputs, output=config.output, force=force
    ) as out:
        if out is None:
            return
        tensors = _tensors(config, model.path, shape, choice)
        write_model_directory(
            out.main,
            model.path,
            tensors,
            shape=SharedExpertShape(config.num_shared_experts, _width(config, shape)),
            metadata=_metadata(config, model, shape, choice, tensors),
            link="copy" if config.copy_shards else "hard",
        )
        out.add(out.main, format=FORMAT)
        _report(out.main, shape, tensors)


def _width(config: ConvertConfig, shape: ModelShape) -> int:
    return config.shared_intermediate_size or shape.intermediate_size


def _choice(
    config: ConvertConfig, pca: Artifact, model: Artifact, shape: ModelShape
) -> list[list[tuple[int, int]]]:
    """For each layer the experts to average, as (layer, expert)."""
    stats = load_pca_stats(pca.path)
    if (stats.num_layers, stats.num_experts) != (shape.num_layers, shape.num_experts):
        raise ArtifactError(
            f"{pca.path} is of a model of {stats.num_layers} layers of {stats.num_experts} "
            f"experts; {model.path} has {shape.num_layers} of {shape.num_experts}",
            hint="run nexus collect and nexus pca on this model",
        )
    if stats.model_fingerprint != model.digest:
        raise ArtifactError(
            f"{pca.path} was made from another model than {model.path}",
            hint="run nexus collect and nexus pca on this model",
        )
    return _experts(config, stats, pca.path)


def _experts(config: ConvertConfig, stats: PcaStats, path: Path) -> list[list[tuple[int, int]]]:
    layers = range(stats.num_layers)
    if config.init_strategy == "top1_average":
        # The original's name for it: the one most used expert of all, copied to every layer.
        best = max(
            ((layer, expert) for layer in layers for expert in range(stats.num_experts)),
            key=lambda place: stats.usage[place[0]][place[1]],
        )
        return [[best] for _ in layers]
    if config.init_strategy in ("top1", "top4_average"):
        count = 1 if config.init_strategy == "top1" else 4
        ranked = [
            sorted(range(stats.num_experts), key=lambda e: -stats.usage[layer][e])
            for layer in layers
        ]
        return [[(layer, e) for e in ranked[layer][:count]] for layer in layers]
    count = config.num_experts or stats.top_k
    if count > stats.top_k:
        raise ConfigError(
            f"{config.init_strategy} needs {count} experts a layer, and {path} names {stats.top_k}",
            hint=f"run: nexus pca --top-k {count}, or use --init-strategy pca_top{stats.top_k}",
        )
    return [[(layer, e) for e in stats.experts[layer][:count]] for layer in layers]


def _tensors(
    config: ConvertConfig,
    model: Path,
    shape: ModelShape,
    choice: Sequence[Sequence[tuple[int, int]]] | None,
) -> dict[str, Tensor]:
    if not config.num_shared_experts:
        return {}
    generator = torch.Generator().manual_seed(config.seed)
    tensors: dict[str, Tensor] = {}
    with open_experts(model) as reader:
        for layer in console.progress(range(shape.num_layers), "shared experts"):
            expert = _start_of(config, shape, reader, choice[layer] if choice else (), generator)
            tensors |= initialise.shared_expert_tensors(
                layer,
                expert,
                start=config.start,
                output_scale=config.output_scale,
                dtype=torch.bfloat16,
            )
    return tensors


def _start_of(
    config: ConvertConfig,
    shape: ModelShape,
    reader: ExpertReader,
    places: Sequence[tuple[int, int]],
    generator: torch.Generator,
) -> ExpertWeights:
    width = _width(config, shape)
    if not places:
        return initialise.random_expert(shape.hidden_size, width, generator)
    return initialise.fit_width(initialise.read_average(reader, places), width, generator)


def _metadata(
    config: ConvertConfig,
    model: Artifact,
    shape: ModelShape,
    choice: Sequence[Sequence[tuple[int, int]]] | None,
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    return {
        "format": "nexus.conversion/1",
        "base": {"path": str(model.path), "fingerprint": model.digest},
        "init_strategy": config.init_strategy,
        "start": config.start,
        "output_scale": config.output_scale if config.start == "scaled" else None,
        "experts": choice,
        "shared_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "num_layers": shape.num_layers,
        "num_experts": shape.num_experts,
        "shared_expert_intermediate_size": _width(config, shape),
        "environment": manifest.environment(),
        "converted": manifest.now().isoformat(timespec="seconds"),
    }


def _describe(
    config: ConvertConfig, workspace: Workspace, model: Artifact, shape: ModelShape
) -> None:
    """What would be written, and whether the disk holds it."""
    added = replace(
        shape,
        num_shared_experts=config.num_shared_experts,
        shared_intermediate_size=_width(config, shape),
    ).shared_parameters
    shards = {model.path / name for name in model_dir.weight_map(model.path).values()}
    base_bytes = sum(shard.stat().st_size for shard in shards)
    needed = added * BYTES_PER_WEIGHT + (base_bytes if config.copy_shards else 0)
    target = config.output or workspace.stage_dir("convert") / "model"
    free = free_disk(target)
    console.result_table(
        "nexus convert would",
        ("what", "value"),
        [
            ("convert", model.path),
            ("layers x experts", f"{shape.num_layers} x {shape.num_experts}"),
            ("start the shared expert", f"{config.init_strategy}, {config.start}"),
            ("add parameters", f"{added:,}"),
            ("link" if not config.copy_shards else "copy", gib(base_bytes)),
            ("write", f"{gib(needed)} of {gib(free)} free"),
            ("to", target),
        ],
    )
    if needed > free:
        raise ResourceError(f"{target} has no room for {gib(needed)}", hint="use another --output")


def _report(folder: Path, shape: ModelShape, tensors: Mapping[str, Tensor]) -> None:
    added = sum(tensor.numel() for tensor in tensors.values())
    console.result(
        f"{folder}: {shape.num_layers} layers of {shape.num_experts} experts, "
        f"{added:,} parameters added"
    )
