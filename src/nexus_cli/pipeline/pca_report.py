"""What ``nexus pca`` says at its end: the choice, how importance is spread, and every layer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus_cli.config.pca import PcaConfig
from nexus_cli.core.router.analysis import METHODS
from nexus_cli.io import console

log = logging.getLogger(__name__)

# heading in the table -> entry of a layer
CHOSEN_HOLD = {
    "import.": "importance_fraction",
    "usage": "usage_fraction",
    "variance": "variance_explained",
}


def report(config: PcaConfig, document: Mapping[str, Any], path: Path) -> None:
    """Print the statistics that ``document``, the content of ``path``, holds.

    Args:
        config: of the run.
        document: as ``docs/router-statistics.md`` describes it.
        path: where it was written.
    """
    layers = list(document["layers"].values())
    for line in (
        f"{path}: {_choice(config, document)}",
        _held(layers, document["distribution"]["reuse"], document["num_experts"]),
        _pattern(document["distribution"], document["num_experts"]),
        _spread(document["distribution"]),
        *_units(layers, document["num_experts"]),
    ):
        console.result(line)
    for line in _table(config, layers):
        console.result(line)
    _warn_of_copies(layers)


def _choice(config: PcaConfig, document: Mapping[str, Any]) -> str:
    explained = document["variance_explained_by_method"]
    others = ", ".join(f"{m} {explained[m]:.1%}" for m in METHODS if m != config.method)
    experts, layers = document["num_experts"], document["num_layers"]
    number = document["experts_per_layer"]
    taken = f"{number['least']} of {experts} experts in each of {layers} layers"
    if number["least"] != number["most"]:
        taken = (
            f"{number['least']} to {number['most']} (median {number['median']:g}) of {experts} "
            f"experts in each of {layers} layers"
        )
    if config.explained is not None:
        taken += f", the fewest that hold {config.explained:.4g} of a layer's usage,"
    return f"{taken} explain {explained[config.method]:.1%} of the router's variance ({others})"


def _held(layers: Sequence[Mapping[str, Any]], reuse: Mapping[str, Any], num_experts: int) -> str:
    importance = [layer["importance_fraction"] for layer in layers]
    usage = [layer["usage_fraction"] for layer in layers]
    return (
        f"they hold {_mean(importance):.1%} of the importance ({min(importance):.1%} to "
        f"{max(importance):.1%} a layer) and {_mean(usage):.1%} of the usage; reuse: "
        f"{reuse['distinct_indices']} of {num_experts} indices, each in "
        f"{reuse['selections_per_index']:.2f} layers"
    )


def _pattern(distribution: Mapping[str, Any], num_experts: int) -> str:
    basis, gap = distribution["pattern_of"], distribution["largest_gap_after_rank"]
    means = distribution["mean_top_fractions"]
    sizes = [basis["top"], *(int(n) for n in means if basis["top"] < int(n) < num_experts)]
    shares = {str(basis["top"]): basis["mean_fraction"], **means}
    held = ", ".join(f"top {n} {shares[str(n)]:.1%} (even {n / num_experts:.1%})" for n in sizes)
    return (
        f"importance is {distribution['pattern']}: {held}; the largest gap comes after rank "
        f"{gap['mean']:.1f} on average ({gap['least']} to {gap['most']})"
    )


def _spread(distribution: Mapping[str, Any]) -> str:
    percentiles = ", ".join(f"{p} {v:.4f}" for p, v in distribution["percentiles"].items())
    return f"importance of an expert: mean {distribution['mean']:.4f}, {percentiles}"


def _units(layers: Sequence[Mapping[str, Any]], num_experts: int) -> Iterator[str]:
    if not all("unit_share" in layer for layer in layers):
        return
    chosen, every = (
        _mean([layer["unit_share"][key] for layer in layers])
        for key in ("chosen_experts", "all_experts")
    )
    yield (
        f"as many hidden units as one expert has: the best of the chosen experts make {chosen:.1%} "
        f"of all contributions, of all experts {every:.1%} (even {1 / num_experts:.1%})"
    )


def _table(config: PcaConfig, layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line a layer, in less than 80 columns; a box around them would not fit."""
    num_experts = len(layers[0]["importance"])
    sizes = [n for n in layers[0]["distribution"]["top_fractions"] if int(n) < num_experts]
    shapes = [layer["distribution"] for layer in layers]

    def whole(cells: Iterable[object]) -> list[str]:
        return [str(cell) for cell in cells]

    def shares(name: str) -> list[str]:
        return [f"{layer[name]:.0%}" for layer in layers]

    columns = [("layer", whole(range(len(layers))))]
    if config.explained is not None:
        columns += [("takes", whole(len(layer["top_expert_indices"]) for layer in layers))]
    columns += [("90% PCs", whole(layer["components_for_90_percent"] for layer in layers))]
    columns += [
        (f"top {n}", [f"{shape['top_fractions'][n]:.0%}" for shape in shapes]) for n in sizes
    ]
    columns += [("gap after", whole(shape["largest_gap"]["after_rank"] for shape in shapes))]
    columns += [(f"chosen {name}", shares(entry)) for name, entry in CHOSEN_HOLD.items()]
    columns += [("expert groups", whole(len(layer["families"]) for layer in layers))]
    for cells in zip(*(_column(title, values) for title, values in columns), strict=True):
        yield "  ".join(cells)


def _column(title: str, values: Sequence[str]) -> list[str]:
    """A column of one width; the words of its title stand above each other."""
    words = title.split(" ", 1)
    lines = ["", *words] if len(words) == 1 else words
    cells = [*lines, *values]
    width = max(map(len, cells))
    return [cell.rjust(width) for cell in cells]


def _warn_of_copies(layers: Sequence[Mapping[str, Any]]) -> None:
    short = [
        f"{index} ({layer['independent_experts']} of {len(layer['top_expert_indices'])})"
        for index, layer in enumerate(layers)
        if layer["independent_experts"] < len(layer["top_expert_indices"])
    ]
    if short:
        log.warning(
            "in layer %s fewer experts are independent than were taken; the rest was filled by "
            "usage",
            ", ".join(short),
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
