"""Which experts of a model a shared expert starts from."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.pca_stats import PcaStats, load_pca_stats
from nexus_cli.pipeline.inputs import Artifact

log = logging.getLogger(__name__)

Place = tuple[int, int]  # layer, expert


@dataclass(frozen=True)
class Choice:
    """The experts to start from, and the statistics that name them.

    Attributes:
        source: the statistics' file.
        stats: its content.
        places: for each layer, the experts to average.
    """

    source: Artifact
    stats: PcaStats
    places: Sequence[Sequence[Place]]


def choose(config: ConvertConfig, pca: Artifact, model: Artifact, shape: ModelShape) -> Choice:
    """The experts that ``config.init_strategy`` takes from the statistics ``pca`` of ``model``.

    Activation counts alone do for the strategies that go by usage; of which model they are, only
    their sizes tell.

    Raises:
        ArtifactError: the statistics are damaged, or of another model.
        ConfigError: they name fewer experts than are asked for, or none.
    """
    stats = load_pca_stats(pca.path)
    if (stats.num_layers, stats.num_experts) != (shape.num_layers, shape.num_experts):
        raise ArtifactError(
            f"{pca.path} is of a model of {stats.num_layers} layers of {stats.num_experts} "
            f"experts; {model.path} has {shape.num_layers} of {shape.num_experts}",
            hint="run nexus collect and nexus pca on this model",
        )
    if stats.experts is None:
        log.warning(
            "%s does not say which model it counted: only its %d layers of %d experts could be "
            "compared with %s",
            pca.path,
            stats.num_layers,
            stats.num_experts,
            model.path,
        )
    elif stats.model_fingerprint != model.digest:
        raise ArtifactError(
            f"{pca.path} was made from another model than {model.path}",
            hint="run nexus collect and nexus pca on this model",
        )
    return Choice(pca, stats, _places(config, stats, pca.path))


def _places(config: ConvertConfig, stats: PcaStats, path: Path) -> list[list[Place]]:
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
    if stats.experts is None:
        raise ConfigError(
            f"{config.init_strategy} needs chosen experts, and {path} holds only how often each "
            "is used",
            hint="run nexus collect and nexus pca, or use --init-strategy top1, top1_average or "
            "top4_average",
        )
    return _first(config, stats.experts, stats.num_experts, path)


def _first(
    config: ConvertConfig, experts: Sequence[Sequence[int]], num_experts: int, path: Path
) -> list[list[Place]]:
    """The first N chosen experts of every layer, or all that it names.

    The default's N is what nobody asked for, so a layer that names fewer gives what it has.
    """
    count = config.num_experts
    by_default = "init_strategy" not in config.model_fields_set
    fewest = min(range(len(experts)), key=lambda layer: len(experts[layer]))
    named = len(experts[fewest])
    if count is not None and count > named and not by_default:
        smaller = re.sub(r"\d+$", str(named), config.init_strategy)
        more = f"run: nexus pca --top-k {count}, or " if count <= num_experts else ""
        raise ConfigError(
            f"{config.init_strategy} needs {count} experts a layer, and {path} names {named} in "
            f"layer {fewest}" + ("" if more else f"; the model has {num_experts}"),
            hint=f"{more}use --init-strategy {smaller}",
        )
    return [[(layer, expert) for expert in chosen[:count]] for layer, chosen in enumerate(experts)]
