"""Read which experts each layer's shared expert starts from, and how much each is used.

Two files say so: ``nexus.pca_stats/1``, and activation counts alone in the layout of the original
tool, which names no chosen experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_cli.errors import ArtifactError
from nexus_cli.io import model_dir
from nexus_cli.io.activation_counts import counted_usage, is_activation_counts

FORMAT = "nexus.pca_stats/1"
AGAIN = "run nexus pca again, with --force"


@dataclass(frozen=True)
class PcaStats:
    """The chosen experts of each layer, and how much each expert is used.

    Attributes:
        model_fingerprint: of the model that was measured; ``None`` in activation counts.
        num_layers: L.
        num_experts: E.
        top_k: experts chosen in every layer; ``None`` if layers differ, or none are chosen.
        experts: for each layer, the chosen ones, best first; ``None`` in activation counts.
        usage: for each layer, of every expert.
        method: how they were chosen, for the record; files of other tools may not say.
        tokens: how many were measured, likewise.
    """

    model_fingerprint: str | None
    num_layers: int
    num_experts: int
    top_k: int | None
    experts: tuple[tuple[int, ...], ...] | None
    usage: tuple[tuple[float, ...], ...]
    method: str | None
    tokens: int | None


def load_pca_stats(path: Path) -> PcaStats:
    """Read and check either file.

    Raises:
        ArtifactError: neither of them, or its numbers do not fit each other.
    """
    document = model_dir.read_json(path)
    if is_activation_counts(document):
        usage = counted_usage(document, path)
        return PcaStats(
            model_fingerprint=None,
            num_layers=len(usage),
            num_experts=len(usage[0]),
            top_k=None,
            experts=None,
            usage=usage,
            method=None,
            tokens=None,
        )
    if document.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is not a {FORMAT} file, and holds no activation counts either",
            hint="nexus pca writes it",
        )
    return _chosen(document, path)


def _chosen(document: dict[str, Any], path: Path) -> PcaStats:
    if problem := _layout_problem(document):
        raise ArtifactError(f"{path} is damaged: {problem}", hint=AGAIN)
    layers = [document["layers"][f"layer_{i}"] for i in range(document["num_layers"])]
    stats = PcaStats(
        model_fingerprint=document["model_fingerprint"],
        num_layers=document["num_layers"],
        num_experts=document["num_experts"],
        top_k=document["top_k"],
        experts=tuple(tuple(layer["top_expert_indices"]) for layer in layers),
        usage=tuple(tuple(layer["usage"]) for layer in layers),
        method=document.get("method"),
        tokens=document.get("tokens"),
    )
    for layer, (chosen, usage) in enumerate(zip(stats.experts or (), stats.usage, strict=True)):
        if problem := _choice_problem(chosen, stats) or _usage_problem(usage, stats):
            raise ArtifactError(f"{path} is damaged: layer {layer} {problem}", hint=AGAIN)
    return stats


def _layout_problem(document: Mapping[str, Any]) -> str:
    """What is missing, or of another kind than it must be, if anything."""
    for name in ("model_fingerprint", "num_layers", "num_experts", "top_k", "layers"):
        if name not in document:
            return f"it lacks {name}"
    for name in ("num_layers", "num_experts", "top_k"):
        value = document[name]
        if not (type(value) is int and value > 0) and not (name == "top_k" and value is None):
            return f"its {name} is no number of one or more: {_shown(value)}"
    layers = document["layers"]
    if not isinstance(layers, Mapping):
        return f"its layers are no entries by name: {_shown(layers)}"
    for index in range(document["num_layers"]):
        layer = layers.get(f"layer_{index}")
        if not isinstance(layer, Mapping):
            return f"it lacks layer_{index}"
        for name in ("top_expert_indices", "usage"):
            if not isinstance(layer.get(name), list):
                return f"layer {index} lacks a list of its {name}"
    return ""


def _shown(value: object) -> str:
    return repr(value)[:24]


def _choice_problem(chosen: Sequence[Any], stats: PcaStats) -> str:
    if not chosen or len(chosen) != (stats.top_k or len(chosen)):
        return f"names {len(chosen)} experts, not {stats.top_k or 'one or more'}"
    if any(type(expert) is not int or not 0 <= expert < stats.num_experts for expert in chosen):
        return "names experts that do not exist"
    return "names an expert twice" if len(set(chosen)) < len(chosen) else ""


def _usage_problem(usage: Sequence[Any], stats: PcaStats) -> str:
    # NaN is neither; an int may be too large for a float
    numbers = all(isinstance(share, int | float) and 0 <= share < 2**63 for share in usage)
    return "" if len(usage) == stats.num_experts and numbers else "lacks the usage of its experts"
