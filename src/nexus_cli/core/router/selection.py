"""Which experts to take: by importance, by usage, or so that none repeats another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: E experts, T taken experts, in the order in which they are taken.

# A residual below this share of the expert's own variance is rounding, not variance.
_EXHAUSTED = 1e-9
# An expert of which one taken expert leaves less than this share is its copy: rounding a router's
# logits to bfloat16 leaves less than that between two copies.
_COPY = 1e-3


@dataclass(frozen=True)
class ExpertSelection:
    """Experts of one layer, best first.

    Attributes:
        experts_T: their indices, int64, distinct.
        score_T: what each was taken for; the method says of what unit.
        independent: how many of the first ones are not redundant given those before them.
            Equals T except for ``diverse`` on a layer with too few distinct experts.
    """

    experts_T: NDArray[np.int64]
    score_T: NDArray[np.float64]
    independent: int

    def first(self, count: int) -> ExpertSelection:
        """The ``count`` experts that were taken first, or all if there are no more."""
        return ExpertSelection(
            self.experts_T[:count], self.score_T[:count], min(count, self.independent)
        )

    def count_for(self, share: float, usage_E: NDArray[np.float64]) -> int:
        """The fewest of the first experts that together hold ``share`` of all usage.

        An expert that adds little is counted all the same: the order is the selection's. If all
        T together hold less, all count.

        Args:
            share: in (0, 1].
            usage_E: of every expert of the layer, not negative ``[E]``.
        """
        held_T = np.cumsum(usage_E[self.experts_T])
        # Sums of shares fall short of the whole by rounding.
        reached_T = held_T >= (share - 1e-12) * float(usage_E.sum())
        return int(reached_T.argmax()) + 1 if reached_T.any() else len(self.experts_T)


def select_highest(score_E: NDArray[np.float64], count: int) -> ExpertSelection:
    """The ``count`` experts of highest score; the lower index wins a tie.

    Raises:
        ValueError: if ``count`` is not between 1 and E.
    """
    _check(count, len(score_E))
    experts_T = np.argsort(-score_E, kind="stable")[:count].astype(np.int64)
    return ExpertSelection(experts_T, score_E[experts_T], count)


def select_diverse(
    covariance_EE: NDArray[np.float64], usage_E: NDArray[np.float64], count: int
) -> ExpertSelection:
    """Greedily take the expert with the most variance that those taken do not explain.

    Each step takes the largest ``usage_e * Var(p_e | p of the taken)``, the conditional variance
    under a linear model. This is Cholesky decomposition of ``D C D`` with complete pivoting,
    ``D = diag(sqrt(usage))`` (Harbrecht, Peters and Schneider 2012), and equally the greedy
    maximisation of the log-determinant of the chosen block.

    Two kinds of experts are redundant, and never taken while another is not, however rarely that
    is used: one that those taken explain but for rounding, and a copy of a taken one, which rises
    with it and is known from it to less than 3 % of its standard deviation. An expert that falls
    as another rises is no copy: where two share nearly all tokens, each is about one minus the
    other, and both do half of the work.

    When all that remain are redundant, the rest is filled by usage; ``independent`` tells.

    Args:
        covariance_EE: of router probabilities, symmetric ``[E, E]``, float64.
        usage_E: mean applied weight, not negative ``[E]``.
        count: how many to take.

    Returns:
        The selection; a score is the share of the layer's usage-weighted variance that taking
        the expert newly accounts for in its own coordinate, 0 for those filled in.

    Raises:
        ValueError: if ``count`` is not between 1 and E, or the shapes differ.
    """
    num_experts = len(usage_E)
    _check(count, num_experts)
    if covariance_EE.shape != (num_experts, num_experts):
        raise ValueError(f"a covariance of shape {covariance_EE.shape} for {num_experts} experts")
    scale_E = np.sqrt(usage_E)
    kernel_EE = scale_E[:, None] * covariance_EE * scale_E[None, :]
    own_E = np.diagonal(kernel_EE).copy()
    left_E = own_E.copy()
    copy_E = np.zeros(num_experts, bool)
    factor_TE = np.zeros((count, num_experts))
    taken: list[int] = []
    scores: list[float] = []
    while len(taken) < count:
        open_E = (left_E > _EXHAUSTED * own_E) & ~copy_E
        open_E[taken] = False
        if not open_E.any():
            break
        pivot = int(np.where(open_E, left_E, -np.inf).argmax())
        step = len(taken)
        row_E = (kernel_EE[pivot] - factor_TE[:step, pivot] @ factor_TE[:step]) / np.sqrt(
            left_E[pivot]
        )
        factor_TE[step] = row_E
        scores.append(float(left_E[pivot] / own_E.sum()))
        taken.append(pivot)
        left_E = np.maximum(left_E - row_E**2, 0.0)
        copy_E |= _copies(kernel_EE, pivot)
    independent = len(taken)
    taken += _most_used(usage_E, count - independent, besides=taken)
    scores += [0.0] * (count - independent)
    return ExpertSelection(np.array(taken, np.int64), np.array(scores), independent)


def _most_used(usage_E: NDArray[np.float64], count: int, besides: Sequence[int]) -> list[int]:
    known = set(besides)
    ranked = [int(e) for e in np.argsort(-usage_E, kind="stable")]
    return [e for e in ranked if e not in known][:count]


def _copies(kernel_EE: NDArray[np.float64], original: int) -> NDArray[np.bool_]:
    """Which experts correlate with ``original``, positively, to ``1 - r^2 < _COPY``."""
    with_E, own_E = kernel_EE[original], np.diagonal(kernel_EE)
    known_E = np.square(with_E) > (1 - _COPY) * own_E[original] * own_E
    copy_E: NDArray[np.bool_] = known_E & (with_E > 0)
    return copy_E


def explained_by(covariance_EE: NDArray[np.float64], experts_T: NDArray[np.int64]) -> float:
    """Share of the layer's variance that a linear model of the taken experts explains.

    ``tr(C_:T C_TT^+ C_T:) / tr(C)``, in [0, 1]; it says of any selection how much of what the
    router does is seen through it.

    Args:
        covariance_EE: symmetric ``[E, E]``, float64.
        experts_T: indices.
    """
    total = float(np.trace(covariance_EE))
    if total <= 0:
        return 0.0
    # In units of standard deviation, or rarely used experts would drown in the cut-off below.
    deviation_E = np.sqrt(np.diagonal(covariance_EE))
    deviation_E = np.where(deviation_E > 0, deviation_E, 1.0)
    correlation_EE = covariance_EE / deviation_E[:, None] / deviation_E[None, :]
    cross_TE = correlation_EE[experts_T]
    inverse_TT = np.linalg.pinv(cross_TE[:, experts_T], rcond=_EXHAUSTED, hermitian=True)
    explained_E = np.einsum("te,tu,ue->e", cross_TE, inverse_TT, cross_TE)
    return float(np.clip((explained_E * deviation_E**2).sum() / total, 0.0, 1.0))


def _check(count: int, num_experts: int) -> None:
    if not 1 <= count <= num_experts:
        raise ValueError(f"cannot take {count} of {num_experts} experts")
