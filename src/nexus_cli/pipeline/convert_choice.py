"""Which experts of a model a shared expert starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.pca_stats import PcaStats, load_pca_stats
from nexus_cli.pipeline.inputs import Artifact

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

    Raises:
        ArtifactError: the statistics are damaged, or of another model.
        ConfigError: they name fewer experts than are asked for.
    """
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
    count = config.num_experts or stats.top_k
    if count > stats.top_k:
        raise ConfigError(
            f"{config.init_strategy} needs {count} experts a layer, and {path} names {stats.top_k}",
            hint=f"run: nexus pca --top-k {count}, or use --init-strategy pca_top{stats.top_k}",
        )
    return [[(layer, e) for e in stats.experts[layer][:count]] for layer in layers]
