"""Read activation counts: how many tokens each expert got, in the layout of the original tool.

``{num_layers, num_experts, top_k, layers: {layer_i: {top_expert_idx, top_expert_count,
activation_counts}}}``. ``top_k`` there is experts a token. The best expert follows from the counts,
so that only these are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_cli.errors import ArtifactError

COUNTS = "activation_counts"
HINT = "count again, or use what nexus collect and nexus pca write"


def is_activation_counts(document: Mapping[str, Any]) -> bool:
    """Whether ``document`` is meant to be such a file: any layer holds counts, and no format."""
    layers = document.get("layers")
    return (
        "format" not in document
        and isinstance(layers, Mapping)
        and any(isinstance(layer, Mapping) and COUNTS in layer for layer in layers.values())
    )


def counted_usage(document: Mapping[str, Any], path: Path) -> tuple[tuple[float, ...], ...]:
    """Each expert's share of its layer's counts ``[L][E]``; sums to one in every layer.

    Raises:
        ArtifactError: a layer is missing, or its counts are not ``num_experts`` numbers of zero
            or more, one of them above zero.
    """
    num_layers, num_experts = (
        _size(document, name, path) for name in ("num_layers", "num_experts")
    )
    layers = document["layers"]
    if extra := len(layers) - num_layers:
        more = "more" if extra > 0 else "fewer"
        raise ArtifactError(
            f"{path} holds {len(layers)} layers, {more} than its num_layers, {num_layers}",
            hint=HINT,
        )
    return tuple(_layer(layers, index, num_experts, path) for index in range(num_layers))


def _size(document: Mapping[str, Any], name: str, path: Path) -> int:
    value = document.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArtifactError(
            f"{path} lacks {name}, or it is no number of one or more: {value!r}", hint=HINT
        )
    return value


def _layer(
    layers: Mapping[str, Any], index: int, num_experts: int, path: Path
) -> tuple[float, ...]:
    layer = layers.get(f"layer_{index}")
    counts = layer.get(COUNTS) if isinstance(layer, Mapping) else None
    problem = "has no list of them"
    if isinstance(counts, list):
        problem = _problem(counts, num_experts)
        if not problem:
            total = math.fsum(counts)
            return tuple(count / total for count in counts)
    raise ArtifactError(f"{path}: {COUNTS} of layer_{index}: {problem}", hint=HINT)


def _problem(counts: list[Any], num_experts: int) -> str:
    """What is wrong with a layer's counts, if anything."""
    if len(counts) != num_experts:
        return f"{len(counts)} counts for {num_experts} experts"
    for expert, count in enumerate(counts):
        shown = repr(count)[:24]
        if isinstance(count, bool) or not isinstance(count, int | float):
            return f"{shown} for expert {expert} is no number"
        if not 0 <= count < 2**63:  # NaN is neither
            return f"{shown} for expert {expert} is no count"
    return "" if any(counts) else "all are zero"
