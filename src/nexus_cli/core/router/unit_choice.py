"""Which hidden units of a layer's experts to take, by what they contribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: E experts, I expert width, N candidate units.


@dataclass(frozen=True)
class ChosenUnits:
    """Whole hidden units of one layer's experts.

    Attributes:
        units: the chosen units of every expert that has any, ascending, int64.
        share: of what all units of all of the layer's experts contribute.
    """

    units: Mapping[int, NDArray[np.int64]]
    share: float


def choose_units(
    contribution_EI: NDArray[np.floating[Any]], experts: Sequence[int], count: int
) -> ChosenUnits:
    """The ``count`` units of ``experts`` that contribute most, or all of them if they are fewer.

    Args:
        contribution_EI: of the layer's units, not negative.
        experts: candidates, distinct; of units that contribute alike, those of the expert that is
            named first, and then of the lower index, win.
        count: at least one.

    Raises:
        ValueError: no expert, an expert that does not exist, or a count below one.
    """
    num_experts, width = contribution_EI.shape
    if count < 1 or not experts or not set(experts) <= set(range(num_experts)):
        raise ValueError(f"cannot choose {count} units of experts {list(experts)}")
    candidate_N = contribution_EI[list(experts)].reshape(-1).astype(np.float64)
    best = np.sort(np.argsort(-candidate_N, kind="stable")[:count])
    owner, unit = np.divmod(best, width)
    units = {e: unit[owner == place] for place, e in enumerate(experts)}
    total = float(contribution_EI.sum(dtype=np.float64))
    return ChosenUnits(
        units={e: chosen for e, chosen in units.items() if len(chosen)},
        share=float(candidate_N[best].sum()) / total if total > 0 else 0.0,
    )


def share_of_best(
    contribution_EI: NDArray[np.floating[Any]], experts: Sequence[int], count: int
) -> float:
    """The share that :func:`choose_units` reports, without naming the units.

    Args:
        contribution_EI: of the layer's units, not negative.
        experts: candidates, distinct.
        count: how many of their units.
    """
    total = float(contribution_EI.sum(dtype=np.float64))
    candidate_N = contribution_EI[list(experts)].reshape(-1)
    if count < len(candidate_N):
        candidate_N = np.partition(candidate_N, len(candidate_N) - count)[-count:]
    return float(candidate_N.sum(dtype=np.float64)) / total if total > 0 else 0.0
