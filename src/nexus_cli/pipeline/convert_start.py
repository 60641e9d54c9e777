"""What each layer's shared expert starts from, by the strategy that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.model.gpt_oss import initialise
from nexus_cli.core.model.gpt_oss.neurons import read_units
from nexus_cli.core.model.gpt_oss.slices import ExpertReader, ExpertWeights
from nexus_cli.core.router.unit_choice import ChosenUnits, choose_units
from nexus_cli.errors import ArtifactError
from nexus_cli.io import model_dir, unit_contributions
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.pipeline.convert_choice import Choice
from nexus_cli.pipeline.convert_plan import width_of

# Shape letters in this file: L layers, E experts, I expert width.


@dataclass(frozen=True)
class Source:
    """What the shared experts are made from.

    Attributes:
        reader: of the model's routed experts.
        choice: experts that the statistics name; ``None`` where the strategy is ``random``.
        units: for each layer, the hidden units of those experts; ``None`` where experts are
            averaged.
    """

    reader: ExpertReader
    choice: Choice | None
    units: Sequence[ChosenUnits] | None = None


def choose_neurons(config: ConvertConfig, choice: Choice, shape: ModelShape) -> list[ChosenUnits]:
    """For each layer, the units of the chosen experts that contribute most.

    Raises:
        ArtifactError: the statistics do not say what units contribute, are of experts of another
            width, or say of all units in question that they contribute nothing.
    """
    path = choice.source.path
    contribution_LEI = unit_contributions.read(path, model_dir.read_json(path))
    expected = (shape.num_layers, shape.num_experts, shape.intermediate_size)
    if contribution_LEI.shape != expected:
        raise ArtifactError(
            f"{path} says what units of {list(contribution_LEI.shape)} layers, experts and width "
            f"contribute; the model has {list(expected)}",
            hint="run nexus collect and nexus pca on this model",
        )
    experts = [[expert for _, expert in places] for places in choice.places]
    _require_contributions(contribution_LEI, experts, path)
    width = width_of(config, shape)
    return [
        choose_units(contribution_EI, chosen, width)
        for contribution_EI, chosen in zip(contribution_LEI, experts, strict=True)
    ]


def _require_contributions(
    contribution_LEI: NDArray[np.float32], experts: Sequence[Sequence[int]], path: Path
) -> None:
    """Refuse numbers that rank no unit above another."""
    for layer, (contribution_EI, chosen) in enumerate(zip(contribution_LEI, experts, strict=True)):
        problem = ""
        if not (np.isfinite(contribution_EI) & (contribution_EI >= 0)).all():
            problem = f"what units of layer {layer} contribute is not finite, or is negative"
        elif not contribution_EI[list(chosen)].any():
            problem = f"no unit of the experts chosen in layer {layer} contributes anything"
        if problem:
            raise ArtifactError(
                f"{path}: {problem}",
                hint="run nexus collect and nexus pca again, or use --init-strategy pca_topK",
            )


def starting_expert(
    config: ConvertConfig, source: Source, layer: int, generator: torch.Generator
) -> ExpertWeights:
    """The weights that a layer's shared expert starts from, float32.

    Raises:
        ArtifactError: a shard cannot be read.
    """
    shape = source.reader.shape
    width = width_of(config, shape)
    if source.choice is None:
        return initialise.random_expert(shape.hidden_size, width, generator)
    if source.units is not None:
        usage = dict(enumerate(source.choice.stats.usage[layer]))
        expert = _of_units(config, source.reader, layer, source.units[layer].units, usage)
    else:
        expert = initialise.read_average(source.reader, source.choice.places[layer])
    return initialise.fit_width(expert, width, generator)


def _of_units(
    config: ConvertConfig,
    reader: ExpertReader,
    layer: int,
    units: Mapping[int, NDArray[np.int64]],
    usage: Mapping[int, float],
) -> ExpertWeights:
    """A routed expert acts on some tokens, the shared one on all.

    Weighted, each unit is as strong as its expert's mean applied weight, so that the sum is what
    the units contribute to a token on average. Unweighted, they keep their own strength, and the
    bias is the experts' mean by usage.
    """
    if config.init_strategy.startswith("neurons_weighted"):
        return read_units(reader, layer, units, column_scale=usage, bias_scale=usage)
    total = sum(usage[expert] for expert in units)
    share = {e: usage[e] / total if total > 0 else 1 / len(units) for e in units}
    ones = dict.fromkeys(units, 1.0)
    return read_units(reader, layer, units, column_scale=ones, bias_scale=share)


def units_record(units: Sequence[ChosenUnits]) -> dict[str, Any]:
    """For ``conversion_metadata.json``: how many units of which experts, and their share."""
    return {
        "experts": [[[expert, len(chosen)] for expert, chosen in u.units.items()] for u in units],
        "share_of_contribution": [layer.share for layer in units],
    }
