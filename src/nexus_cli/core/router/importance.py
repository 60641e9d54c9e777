"""How much each expert matters, from one layer's covariance and usage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: E experts, C principal components.


@dataclass(frozen=True)
class Components:
    """Principal components of a layer, the strongest first.

    Attributes:
        variance_E: eigenvalues of the covariance, descending, not negative.
        loading_EE: ``loading_EE[c]`` is component ``c`` over the experts, of unit length.
    """

    variance_E: NDArray[np.float64]
    loading_EE: NDArray[np.float64]

    def variance_ratio(self) -> NDArray[np.float64]:
        """Share of the variance of each component; zeros if nothing varies."""
        total = self.variance_E.sum()
        return self.variance_E / total if total > 0 else np.zeros_like(self.variance_E)

    def needed_for(self, share: float) -> int:
        """The fewest components that hold ``share`` of the variance."""
        reached = np.cumsum(self.variance_ratio()) >= share - 1e-12
        return int(reached.argmax()) + 1 if reached.any() else 0


def principal_components(covariance_EE: NDArray[np.float64]) -> Components:
    """Decompose a covariance exactly; what scikit-learn's PCA finds from the samples.

    Signs are fixed so that the largest loading of a component is positive.

    Args:
        covariance_EE: symmetric ``[E, E]``, float64.
    """
    ascending_E, columns_EE = np.linalg.eigh(covariance_EE)
    loading_EE = columns_EE.T[::-1]
    largest_E = np.abs(loading_EE).argmax(axis=1)
    sign_E = np.sign(loading_EE[np.arange(len(loading_EE)), largest_E])
    # rounding leaves the zero eigenvalue (probabilities sum to one) a little below zero
    return Components(np.maximum(ascending_E[::-1], 0.0), loading_EE * sign_E[:, None])


def pca_importance(components: Components, num_components: int) -> NDArray[np.float64]:
    """``sum_c |v_ce| lambda_c / sum(lambda)`` over the first components ``[E]``.

    The score of the original tool. It ranks nearly like plain variance and knows nothing of
    redundancy: two identical experts get the same score.

    Args:
        components: of one layer.
        num_components: how many count; more than E count as E.

    Raises:
        ValueError: if ``num_components`` is not positive.
    """
    if num_components < 1:
        raise ValueError(f"num_components must be positive, not {num_components}")
    ratio_C = components.variance_ratio()[:num_components]
    importance_E: NDArray[np.float64] = ratio_C @ np.abs(components.loading_EE[:num_components])
    return importance_E
