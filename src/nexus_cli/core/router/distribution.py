"""How evenly importance is spread over the experts, for any number of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: L layers, E experts.

LARGEST = (4, 8, 16, 32)
PERCENTILES = (50, 75, 90, 95, 99)
# Of the original tool: the least mean share of the top 4 experts for each verdict.
VERDICTS = ((0.70, "steep"), (0.50, "moderate"), (0.35, "gradual"), (0.0, "even"))


def layer_distribution(importance_E: NDArray[np.float64]) -> dict[str, Any]:
    """Describe one layer's importances; sizes beyond E are left out.

    Args:
        importance_E: not negative.
    """
    descending_E = np.sort(importance_E)[::-1]
    gap_E = descending_E[:-1] - descending_E[1:]
    largest = int(gap_E.argmax()) if len(gap_E) else 0
    return {
        "sorted_importance": descending_E.tolist(),
        "top_fractions": {str(n): fraction for n, fraction in _top_fractions(descending_E)},
        "percentiles": _percentiles(importance_E),
        "largest_gap": {
            "after_rank": largest + 1,
            "value": float(gap_E[largest]) if len(gap_E) else 0.0,
        },
        "mean": float(importance_E.mean()),
        "std": float(importance_E.std()),
    }


def overall_distribution(
    importance_LE: NDArray[np.float64], selected: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Describe all layers together.

    ``reuse`` counts expert *indices* that are selected in several layers. An index means a
    different expert in every layer, so this is no measure of similarity.

    Args:
        importance_LE: not negative.
        selected: the experts taken in each layer.
    """
    top4 = float(np.mean([dict(_top_fractions(np.sort(row)[::-1]))[4] for row in importance_LE]))
    uses = Counter(expert for layer in selected for expert in layer)
    taken = sum(uses.values())
    return {
        "mean_top4_fraction": top4,
        "even_top4_fraction": min(1.0, 4 / importance_LE.shape[1]),
        "pattern": next(name for least, name in VERDICTS if top4 > least or least == 0.0),
        "mean": float(importance_LE.mean()),
        "std": float(importance_LE.std()),
        "percentiles": _percentiles(importance_LE),
        "reuse": {
            "distinct_indices": len(uses),
            "selections_per_index": taken / len(uses),
            "most_selected": [[expert, count] for expert, count in uses.most_common(8)],
        },
    }


def _top_fractions(descending_E: NDArray[np.float64]) -> list[tuple[int, float]]:
    """Share of the total in the largest n, for each n up to E; the top 4 always."""
    total = float(descending_E.sum()) or 1.0
    sizes = [n for n in LARGEST if n <= max(4, len(descending_E))]
    return [(n, float(descending_E[:n].sum()) / total) for n in sizes]


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
