"""Groups of experts that the router uses alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering

# Shape letters in this file: E experts.


@dataclass(frozen=True)
class Families:
    """Clusters of one layer's experts.

    Attributes:
        label_E: family of each expert, int64; numbered along ``order_E``.
        order_E: the experts with families, and within them close experts, side by side.
    """

    label_E: NDArray[np.int64]
    order_E: NDArray[np.int64]

    def groups(self) -> list[list[int]]:
        """Families of more than one expert, the largest first."""
        sizes = Counter(self.label_E.tolist())
        shared = [label for label, size in sizes.most_common() if size > 1]
        return [np.flatnonzero(self.label_E == label).tolist() for label in shared]


def correlation(covariance_EE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlations ``[E, E]``; an expert that never varies correlates with none."""
    deviation_E = np.sqrt(np.diagonal(covariance_EE))
    varies_E = deviation_E > 0
    safe_E = np.where(varies_E, deviation_E, 1.0)
    both_EE = varies_E[:, None] & varies_E[None, :]
    correlation_EE = np.where(both_EE, covariance_EE / safe_E[:, None] / safe_E[None, :], 0.0)
    np.fill_diagonal(correlation_EE, 1.0)
    clipped: NDArray[np.float64] = np.clip(correlation_EE, -1.0, 1.0)
    return clipped


def expert_families(covariance_EE: NDArray[np.float64], max_distance: float) -> Families:
    """Cluster experts by average linkage on ``1 - |correlation|``.

    Args:
        covariance_EE: of router probabilities ``[E, E]``, float64.
        max_distance: families farther apart than this stay apart, in [0, 1].
    """
    num_experts = len(covariance_EE)
    if num_experts == 1:
        return Families(np.zeros(1, np.int64), np.zeros(1, np.int64))
    clustering = AgglomerativeClustering(
        n_clusters=None,
        distance_threshold=max_distance,
        metric="precomputed",
        linkage="average",
        compute_full_tree=True,
    ).fit(1.0 - np.abs(correlation(covariance_EE)))
    order_E = _leaves(clustering.children_, num_experts)
    seen = {
        int(label): number
        for number, label in enumerate(dict.fromkeys(clustering.labels_[order_E]))
    }
    labels = [seen[int(label)] for label in clustering.labels_]
    return Families(np.array(labels, dtype=np.int64), order_E)


def _leaves(children: NDArray[np.int64], num_leaves: int) -> NDArray[np.int64]:
    """Leaves of a merge tree from left to right."""
    under: list[list[int]] = [[leaf] for leaf in range(num_leaves)]
    for left, right in children:
        under.append(under[left] + under[right])
    return np.array(under[-1], dtype=np.int64)
