"""What ``nexus collect --dry-run`` says: the work, and whether it fits."""

from __future__ import annotations

from nexus_cli.config.collect import CollectConfig
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ResourceError
from nexus_cli.io import console
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.capacity import free_disk, free_memory, gib
from nexus_cli.pipeline.inputs import Artifact
from nexus_cli.pipeline.model_memory import Placement
from nexus_cli.pipeline.text import describe_sources
from nexus_cli.pipeline.world import open_world


def describe(
    config: CollectConfig, workspace: Workspace, model: Artifact, shape: ModelShape
) -> None:
    """Print the work; refuse it if it does not fit.

    Raises:
        ResourceError: too little memory or disk.
        NexusError: a source of text or the device is not there.
    """
    sources = describe_sources(config.data, default_split="train")
    world = open_world(config.runtime.device)
    dtype = frozen_dtype(config.dtype, world.device)
    place = Placement(world.device, dtype, config.runtime.experts_backend)
    memory = place.weight_bytes(model.path) + _working_bytes(config, model, shape, place)
    disk = _statistics_bytes(config, shape) * (world.size + 1)  # and each rank's partial ones
    memory_left = free_memory(world.device)
    target = config.output or workspace.stage_dir("collect") / "router_probs.npz"
    disk_left = free_disk(target)
    console.result_table(
        "nexus collect would",
        ("what", "value"),
        [
            ("run", model.path),
            ("layers x experts", f"{shape.num_layers} x {shape.num_experts}"),
            ("on", f"{world.device}, {world.size} rank(s), {str(dtype).removeprefix('torch.')}"),
            ("text", ", ".join(f"{s.name}@{s.split} ({s.origin})" for s in sources)),
            ("choose", f"{config.target_tokens:,} tokens{_rounds(config)}"),
            ("from", f"{config.max_candidates:,} texts of {config.max_seq_length} tokens at most"),
            ("take about", f"{gib(memory)} of {gib(memory_left)} of memory free"),
            ("write at most", f"{gib(disk)} of {gib(disk_left)} free"),
            ("to", target),
        ],
    )
    if memory > memory_left:
        raise ResourceError(
            f"{world.device} has no memory for {gib(memory)}",
            hint="use a smaller --set runtime.batch_size=N, or another --device",
        )
    if disk > disk_left:
        raise ResourceError(f"{target} has no room for {gib(disk)}", hint="use another --output")


def _rounds(config: CollectConfig) -> str:
    return f", {config.batch_select} texts a round" if config.batch_select > 1 else ""


def _working_bytes(
    config: CollectConfig, model: Artifact, shape: ModelShape, place: Placement
) -> int:
    """Activations of one layer, every layer's router logits, and the sums in float64."""
    tokens = config.runtime.batch_size * config.max_seq_length
    layer = place.forward_bytes(model.path, config.runtime.batch_size, config.max_seq_length)
    numbers = tokens * shape.num_layers * shape.num_experts
    if not place.has_engine:  # which counts its decoded experts itself
        numbers += 3 * shape.hidden_size * shape.intermediate_size * shape.num_experts
    sums = 2 * shape.num_layers * shape.num_experts * (shape.num_experts + 4) * 8
    return layer + numbers * place.dtype.itemsize + sums


def _statistics_bytes(config: CollectConfig, shape: ModelShape) -> int:
    cells = shape.num_layers * shape.num_experts
    return 2 * cells * (shape.num_experts + 4) * 8 + config.reservoir * (2 * cells + 8) + 65536
