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
# Of the original tool: the least mean share of the top 4 of 128 experts for each verdict.
VERDICTS = ((0.70, "steep"), (0.50, "moderate"), (0.35, "gradual"))
OTHERWISE = "even"
EVEN_OF_THE_ORIGINAL = 4 / 128


def layer_distribution(importance_E: NDArray[np.float64]) -> dict[str, Any]:
    """Describe one layer's importances; sizes beyond E are left out.

    Args:
        importance_E: not negative.
    """
    descending_E = np.sort(importance_E)[::-1]
    rank, gap = _largest_gap(descending_E)
    return {
        "sorted_importance": descending_E.tolist(),
        "top_fractions": {str(n): fraction for n, fraction in _top_fractions(descending_E)},
        "percentiles": _percentiles(importance_E),
        "largest_gap": {"after_rank": rank, "value": gap},
        "mean": float(importance_E.mean()),
        "std": float(importance_E.std()),
    }


def overall_distribution(
    importance_LE: NDArray[np.float64], selected: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Describe all layers together.

    ``reuse`` counts expert *indices* that are selected in several layers. An index means a
    different expert in every layer, so this is no measure of similarity.

    ``pattern`` is the original tool's verdict on the mean share of the top four experts. Its
    thresholds were set for 128 experts, where an even spread gives four of them 3 %; they are
    moved so that even and one-sided mean the same for any E: with ``n`` the top experts that
    count, ``(share - n/E) / (1 - n/E)`` is compared with ``(threshold - 4/128) / (1 - 4/128)``.
    Below 32 experts ``n`` is an eighth of them, for four of eight would be half of all.

    Args:
        importance_LE: not negative.
        selected: the experts taken in each layer, at least one in all.
    """
    descending_LE = np.sort(importance_LE, axis=1)[:, ::-1]
    num_experts = descending_LE.shape[1]
    fractions = [dict(_top_fractions(row)) for row in descending_LE]
    means = {n: float(np.mean([layer[n] for layer in fractions])) for n in fractions[0]}
    top = min(4, max(1, num_experts // 8))
    share = float(np.mean([_share_of_first(row, top) for row in descending_LE]))
    gaps = [_largest_gap(row)[0] for row in descending_LE]
    uses = Counter(expert for layer in selected for expert in layer)
    taken = sum(uses.values())
    return {
        "mean_top_fractions": {str(n): mean for n, mean in means.items()},
        "mean_top4_fraction": means[4],
        "even_top4_fraction": min(1.0, 4 / num_experts),
        "pattern": _verdict(share, top / num_experts),
        "pattern_of": {"top": top, "mean_fraction": share, "even_fraction": top / num_experts},
        "largest_gap_after_rank": {
            "mean": float(np.mean(gaps)),
            "least": min(gaps),
            "most": max(gaps),
        },
        "mean": float(importance_LE.mean()),
        "std": float(importance_LE.std()),
        "percentiles": _percentiles(importance_LE),
        "reuse": {
            "selections": taken,
            "distinct_indices": len(uses),
            "selections_per_index": taken / len(uses),
            "most_selected": [[expert, count] for expert, count in uses.most_common(8)],
        },
    }


def _top_fractions(descending_E: NDArray[np.float64]) -> list[tuple[int, float]]:
    """Share of the total in the largest n, for each n up to E; the top 4 always."""
    sizes = [n for n in LARGEST if n <= max(4, len(descending_E))]
    return [(n, _share_of_first(descending_E, n)) for n in sizes]


def _share_of_first(descending_E: NDArray[np.float64], count: int) -> float:
    total = float(descending_E.sum())
    return float(descending_E[:count].sum()) / total if total > 0 else 0.0


def _largest_gap(descending_E: NDArray[np.float64]) -> tuple[int, float]:
    """After which rank the importance falls most, counted from 1, and by how much."""
    gap_E = descending_E[:-1] - descending_E[1:]
    largest = int(gap_E.argmax()) if len(gap_E) else 0
    return largest + 1, float(gap_E[largest]) if len(gap_E) else 0.0


def _verdict(share: float, even: float) -> str:
    """How one-sided a share is, where an even spread would give ``even``."""
    if even >= 1.0:
        return OTHERWISE  # of one expert there is nothing to say
    excess = (share - even) / (1.0 - even)
    for least, name in VERDICTS:
        if excess > (least - EVEN_OF_THE_ORIGINAL) / (1.0 - EVEN_OF_THE_ORIGINAL):
            return name
    return OTHERWISE


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
