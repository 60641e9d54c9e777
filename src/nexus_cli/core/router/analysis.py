"""Everything that is said about one layer's experts, from its sums alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nexus_cli.core.router.families import Families, correlation, expert_families
from nexus_cli.core.router.importance import Components, pca_importance, principal_components
from nexus_cli.core.router.moments import TokenSums
from nexus_cli.core.router.selection import (
    ExpertSelection,
    explained_by,
    select_diverse,
    select_highest,
)

# Shape letters in this file: L layers, E experts.

Method = Literal["diverse", "pca", "activation"]
METHODS: tuple[Method, ...] = ("diverse", "pca", "activation")


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer.

    Attributes:
        components: principal components of the router's probabilities.
        importance_E: the original tool's score.
        usage_E: mean applied weight; sums to one.
        top1_E: share of the tokens whose first choice is the expert; sums to one.
        topk_E: share of the tokens that are sent to the expert; sums to k.
        mean_E: mean probability over all experts; sums to one.
        correlation_EE: of the probabilities.
        families: experts that the router uses alike.
        selections: what each method takes; all of them the same number.
        explained: share of the variance that each method's experts explain.
    """

    components: Components
    importance_E: NDArray[np.float64]
    usage_E: NDArray[np.float64]
    top1_E: NDArray[np.float64]
    topk_E: NDArray[np.float64]
    mean_E: NDArray[np.float64]
    correlation_EE: NDArray[np.float64]
    families: Families
    selections: dict[Method, ExpertSelection]
    explained: dict[Method, float]

    def importance_fraction(self, method: Method) -> float:
        """Share of all importance that the experts taken by ``method`` hold."""
        return self._held(self.importance_E, method)

    def usage_fraction(self, method: Method) -> float:
        """Share of all usage that the experts taken by ``method`` hold."""
        return self._held(self.usage_E, method)

    def _held(self, value_E: NDArray[np.float64], method: Method) -> float:
        total = float(value_E.sum())
        taken = value_E[self.selections[method].experts_T].sum()
        return float(taken) / total if total > 0 else 0.0


def analyse_layers(
    sums: TokenSums,
    *,
    method: Method,
    count: int,
    usage_share: float | None = None,
    num_components: int,
    family_distance: float,
) -> list[LayerAnalysis]:
    """Analyse every layer; the cost does not depend on how many tokens were counted.

    Args:
        sums: of at least two tokens.
        method: whose order ``usage_share`` follows; the others take as many, to be compared.
        count: experts to take in every layer, at most E.
        usage_share: in place of ``count``: take in each layer the fewest, in the order of
            ``method``, that hold this share of its usage, in (0, 1].
        num_components: components that count in the importance.
        family_distance: see :func:`~nexus_cli.core.router.families.expert_families`.

    Raises:
        ValueError: if there are fewer than two tokens, or ``count`` is out of range.
    """
    layers = []
    for layer, covariance_EE in enumerate(sums.covariance()):
        components = principal_components(covariance_EE)
        importance_E = pca_importance(components, num_components)
        usage_E = sums.usage()[layer]
        most = count if usage_share is None else len(usage_E)
        ordered: dict[Method, ExpertSelection] = {
            "diverse": select_diverse(covariance_EE, usage_E, most),
            "pca": select_highest(importance_E, most),
            "activation": select_highest(usage_E, most),
        }
        if usage_share is not None:
            most = ordered[method].count_for(usage_share, usage_E)
        selections = {name: order.first(most) for name, order in ordered.items()}
        layers.append(
            LayerAnalysis(
                components=components,
                importance_E=importance_E,
                usage_E=usage_E,
                top1_E=sums.top1_LE[layer] / sums.tokens,
                topk_E=sums.topk_LE[layer] / sums.tokens,
                mean_E=sums.mean()[layer],
                correlation_EE=correlation(covariance_EE),
                families=expert_families(covariance_EE, family_distance),
                selections=selections,
                explained={
                    name: explained_by(covariance_EE, taken.experts_T)
                    for name, taken in selections.items()
                },
            )
        )
    return layers
