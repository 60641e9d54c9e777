"""Router moments to and from their file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_cli.core.router.moments import Reservoir, RouterMoments, TokenSums
from nexus_cli.io import router_probs

# name in the file -> attribute of TokenSums
_ATTRIBUTES = {
    "probability": "probability_LE",
    "outer": "outer_LEE",
    "top1": "top1_LE",
    "topk": "topk_LE",
    "weight": "weight_LE",
}


def save_moments(path: Path, moments: RouterMoments, metadata: Mapping[str, Any]) -> None:
    """Write ``moments`` as a ``nexus.router_probs/1`` file."""
    arrays: dict[str, NDArray[Any]] = {
        "reservoir_keys": moments.reservoir.keys_R,
        "reservoir_probability": moments.reservoir.probability_RLE,
    }
    if moments.units_LEI is not None:
        arrays[router_probs.UNITS] = moments.units_LEI
    for population, sums in (("body", moments.body), ("first", moments.first)):
        arrays[f"{population}_tokens"] = np.array(sums.tokens, dtype=np.int64)
        for name, attribute in _ATTRIBUTES.items():
            arrays[f"{population}_{name}"] = getattr(sums, attribute)
    shape = {
        "num_layers": moments.num_layers,
        "num_experts": moments.num_experts,
        "top_k": moments.top_k,
        "reservoir_capacity": moments.reservoir.capacity,
    }
    router_probs.write(path, arrays, {**metadata, **shape})


def load_moments(path: Path) -> tuple[RouterMoments, dict[str, Any]]:
    """Read a ``nexus.router_probs/1`` file: the moments and the metadata.

    Raises:
        ArtifactError: see :func:`nexus_cli.io.router_probs.read`.
    """
    found = router_probs.read(path)

    def sums(population: str) -> TokenSums:
        parts = {a: found.arrays[f"{population}_{name}"] for name, a in _ATTRIBUTES.items()}
        return TokenSums(tokens=int(found.arrays[f"{population}_tokens"]), **parts)

    reservoir = Reservoir(
        capacity=int(found.metadata.get("reservoir_capacity", 0)),
        keys_R=found.arrays["reservoir_keys"],
        probability_RLE=found.arrays["reservoir_probability"],
    )
    moments = RouterMoments(
        top_k=found.metadata["top_k"],
        body=sums("body"),
        first=sums("first"),
        reservoir=reservoir,
        units_LEI=found.arrays.get(router_probs.UNITS),
    )
    return moments, dict(found.metadata)
