"""Stage ``convert``: a checkpoint and chosen experts in, a model with a shared expert out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.model.gpt_oss import initialise
from nexus_cli.core.model.gpt_oss.export import SharedExpertShape, write_model_directory
from nexus_cli.core.model.gpt_oss.shard import TensorStream
from nexus_cli.core.model.gpt_oss.slices import ExpertReader, ExpertWeights
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import console, model_dir, tensor_files
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert_adapter
from nexus_cli.pipeline.adapters import names_adapter, require_use
from nexus_cli.pipeline.convert_choice import choose
from nexus_cli.pipeline.convert_plan import Plan, describe, make_plan, require_room, width_of
from nexus_cli.pipeline.convert_record import conversion_record
from nexus_cli.pipeline.convert_start import (
    Source,
    choose_neurons,
    starting_expert,
    units_record,
)
from nexus_cli.pipeline.inputs import Artifact, model_input, stage_input
from nexus_cli.pipeline.stage import stage

FORMAT = "nexus.model/1"


def run(
    config: ConvertConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Write ``convert/model/``: the original's shards, linked, and one new shard beside them.

    An adapter comes out as the whole model that it makes of its base; with ``config.adapter`` a
    converted model goes out as an adapter.

    Raises:
        ConfigError: the model has a shared expert already, or more experts are asked for than
            the statistics name.
        ArtifactError: the model's shards do not fit its index or its config, or the statistics are
            of another model.
        ResourceError: the disk or the memory has not enough room.
    """
    console.configure()
    require_use(config.base, config.model)
    if config.adapter:
        convert_adapter.to_adapter(config, workspace, force=force, dry_run=dry_run)
        return
    if names_adapter(config.model):
        convert_adapter.to_model(config, workspace, force=force, dry_run=dry_run)
        return
    model = model_input(config.model)
    shape, reader = _open(model.path)
    inputs = {"model": model}
    source = Source(reader, None)
    if config.needs_stats:
        inputs["pca"] = stage_input(workspace, "pca", config.pca_stats)
        choice = choose(config, inputs["pca"], model, shape)
        units = choose_neurons(config, choice, shape) if config.needs_units else None
        source = Source(reader, choice, units)
    plan = make_plan(config, model.path, shape, source.choice)
    if dry_run:
        describe(plan, config, workspace, model.path, shape)
        require_room(plan, config, workspace)
        return
    with stage(
        "convert",
        config,
        workspace,
        main="model",
        inputs=inputs,
        output=config.output,
        force=force,
        check=lambda: require_room(plan, config, workspace),
    ) as out:
        if out is None:
            return
        _write(out.main, config, model, source, plan)
        out.add(out.main, format=FORMAT)
        console.result(
            f"{out.main}: {shape.num_layers} layers of {shape.num_experts} experts, "
            f"{plan.parameters:,} parameters added"
        )


def _open(model: Path) -> tuple[ModelShape, ExpertReader]:
    """The model's shape and experts, if it is an original one and whole."""
    shape = model_dir.read_shape(model)
    if shape.num_shared_experts:
        raise ConfigError(
            f"{model} has a shared expert already",
            hint="convert the original model, or train this one as it is",
        )
    reader = ExpertReader(model, shape)
    if shape.model_type == model_dir.BASE_TYPE and (problem := tensor_files.misplaced(model)):
        raise ArtifactError(
            f"{model}: {problem}", hint="download the index and all shards of one model"
        )
    return shape, reader


def _write(
    target: Path,
    config: ConvertConfig,
    model: Artifact,
    source: Source,
    plan: Plan,
) -> None:
    sizes = source.reader.shape
    record = conversion_record(config, model, sizes, source.choice, plan)
    if source.units is not None:
        record["units"] = units_record(source.units)
    write_model_directory(
        target,
        model.path,
        TensorStream(_layout(config, sizes), _tensors(config, source)),
        shape=SharedExpertShape(config.num_shared_experts, width_of(config, sizes)),
        metadata=record,
        link="copy" if config.copy_shards else "hard",
    )


def _layout(config: ConvertConfig, shape: ModelShape) -> dict[str, Tensor]:
    """All tensors that :func:`_tensors` makes, on the meta device."""
    if not config.num_shared_experts:
        return {}
    with torch.device("meta"):
        expert = initialise.empty_expert(shape.hidden_size, width_of(config, shape))
        return {
            name: tensor
            for layer in range(shape.num_layers)
            for name, tensor in _stored(config, layer, expert).items()
        }


def _tensors(config: ConvertConfig, source: Source) -> Iterator[tuple[str, Tensor]]:
    """The shared experts, one layer in memory at a time."""
    if not config.num_shared_experts:
        return
    generator = torch.Generator().manual_seed(config.seed)
    for layer in console.progress(range(source.reader.shape.num_layers), "shared experts"):
        stored = _stored(config, layer, starting_expert(config, source, layer, generator))
        for name, tensor in stored.items():
            if not torch.isfinite(tensor).all():
                raise ArtifactError(
                    f"{name} would hold numbers that are not finite: the experts of a layer that "
                    f"it is made from are damaged",
                    hint="download the model again",
                )
            yield name, tensor


def _stored(config: ConvertConfig, layer: int, expert: ExpertWeights) -> Mapping[str, Tensor]:
    return initialise.shared_expert_tensors(
        layer,
        expert,
        start=config.start,
        output_scale=config.output_scale,
        dtype=torch.bfloat16,
    )
