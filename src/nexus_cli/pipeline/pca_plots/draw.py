"""Draws every plot of ``nexus pca``; the only part of the package that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nexus_cli.core.router.analysis import LayerAnalysis, Method
from nexus_cli.pipeline.pca_plots import curves, matrices, units
from nexus_cli.pipeline.pca_plots.style import DPI, house_style

# Shape letters in this file: L layers, E experts, I expert width, R sampled tokens.


def draw(
    folder: Path,
    layers: Sequence[LayerAnalysis],
    method: Method,
    sample_RLE: NDArray[np.float16],
    contribution_LEI: NDArray[np.float32] | None = None,
) -> None:
    """Write every plot into ``folder`` as PNG.

    Args:
        folder: exists.
        layers: one analysis a layer.
        method: whose selection is drawn.
        sample_RLE: probabilities of sampled tokens; without any, one plot is left out.
        contribution_LEI: of hidden units; without it, one plot is left out.
    """
    with house_style():
        figures: dict[str, Figure] = {
            "variance_explained": curves.variance(layers),
            "per_layer_variance": matrices.components(layers),
            "expert_importance_heatmap": matrices.importance(layers, method),
            "selected_experts": matrices.selection(layers, method),
            "expert_usage": matrices.usage(layers),
            "expert_correlation": matrices.correlations(layers, method),
            "importance_distribution": curves.distribution(layers),
        }
        if len(sample_RLE):
            figures["router_confidence"] = curves.confidence(sample_RLE)
        if contribution_LEI is not None:
            chosen = [layer.selections[method].experts_T.tolist() for layer in layers]
            figures["unit_contributions"] = units.contributions(contribution_LEI, chosen)
        for name, figure in figures.items():
            figure.savefig(
                folder / f"{name}.png", dpi=DPI, facecolor="white", pil_kwargs={"compress_level": 3}
            )
