"""What a conversion will read, write and hold in memory, before it does any of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.model.gpt_oss.slices import expert_bytes
from nexus_cli.errors import ResourceError
from nexus_cli.io import console, model_dir
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.capacity import free_disk, free_memory, gib
from nexus_cli.pipeline.convert_choice import Choice

PROCESS_BYTES = 3 * 2**28  # Python with torch and transformers imported, and what else comes
FLOAT32, BFLOAT16 = torch.float32.itemsize, torch.bfloat16.itemsize


@dataclass(frozen=True)
class Plan:
    """Sizes of one conversion, in bytes but for the first.

    Attributes:
        parameters: that it adds.
        experts_read: of packed experts, over all layers; one that is used twice counts twice.
        shards: of the original model, linked or copied.
        new_shard: with the shared experts.
        memory: the largest resident size of the process; an estimate.
    """

    parameters: int
    experts_read: int
    shards: int
    new_shard: int
    memory: int


def width_of(config: ConvertConfig, shape: ModelShape) -> int:
    """Units of the shared expert: a routed expert's, unless said otherwise."""
    return config.shared_intermediate_size or shape.intermediate_size


def make_plan(config: ConvertConfig, model: Path, shape: ModelShape, choice: Choice | None) -> Plan:
    """Sizes of converting ``model``; of its shards only the sizes are looked at."""
    added = replace(
        shape,
        num_shared_experts=config.num_shared_experts,
        shared_intermediate_size=width_of(config, shape),
    )
    shards = {model / name for name in model_dir.weight_map(model).values()}
    packed = expert_bytes(shape)
    experts = sum(map(len, choice.places)) if choice is not None else 0
    return Plan(
        parameters=added.shared_parameters,
        experts_read=experts * packed,
        shards=sum(shard.stat().st_size for shard in shards),
        new_shard=added.shared_parameters * BFLOAT16,
        memory=PROCESS_BYTES
        + _layer_memory(added, packed if experts else 0, of_units=config.needs_units),
    )


def _layer_memory(added: ModelShape, packed: int, *, of_units: bool) -> int:
    """Of one layer's work: the sum in float32, two packed experts, and the layer as it is stored.

    Whole units are put beside each other, decoded expert by expert: all may be of one.

    A random expert, and one of another width than the routed ones', is made beside the sum; the
    units that widen one are made beside both.
    """
    if not added.num_shared_experts:
        return 0
    routed, shared = (
        3 * width * added.hidden_size
        for width in (added.intermediate_size, added.shared_intermediate_size)
    )
    averaged = FLOAT32 * routed + 2 * packed if packed else 0
    made = FLOAT32 * shared if not packed or shared != routed or of_units else 0
    more = FLOAT32 * max(shared - routed, 0) if packed else 0
    return averaged + made + more + BFLOAT16 * shared


def target_of(config: ConvertConfig, workspace: Workspace) -> Path:
    """The folder that the converted model goes to."""
    return config.output or workspace.stage_dir("convert") / "model"


def describe(
    plan: Plan, config: ConvertConfig, workspace: Workspace, model: Path, shape: ModelShape
) -> None:
    """Print what the command would do."""
    target = target_of(config, workspace)
    written = plan.new_shard + (plan.shards if config.copy_shards else 0)
    console.result_table(
        "nexus convert would",
        ("what", "value"),
        [
            ("convert", model),
            ("layers x experts", f"{shape.num_layers} x {shape.num_experts}"),
            ("start the shared expert", f"{config.init_strategy}, {config.start}"),
            ("read of the experts", gib(plan.experts_read)),
            ("add parameters", f"{plan.parameters:,}"),
            ("link" if not config.copy_shards else "copy", gib(plan.shards)),
            ("write", f"{gib(written)} of {gib(free_disk(target))} free"),
            ("hold in memory", f"about {gib(plan.memory)} of {gib(_free_memory())} free"),
            ("to", target),
        ],
    )


def require_room(plan: Plan, config: ConvertConfig, workspace: Workspace) -> None:
    """Refuse a conversion that does not fit, before it starts.

    Raises:
        ResourceError: the disk or the memory has not enough room.
    """
    target = target_of(config, workspace)
    written = plan.new_shard + (plan.shards if config.copy_shards else 0)
    if written > (free := free_disk(target)):
        raise ResourceError(
            f"{target} has no room for {gib(written)}: {gib(free)} are free",
            hint="use another --output" + (", or leave out --copy" if config.copy_shards else ""),
        )
    if plan.memory > (free := _free_memory()):
        raise ResourceError(
            f"the conversion takes about {gib(plan.memory)} of memory, and {gib(free)} are free",
            hint="use a smaller --shared-intermediate-size, or end other programs",
        )


def _free_memory() -> int:
    return free_memory(torch.device("cpu"))
