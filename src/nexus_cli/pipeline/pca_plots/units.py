"""How the work of a layer is spread over the hidden units of its experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nexus_cli.core.router.unit_choice import share_of_best
from nexus_cli.pipeline.pca_plots.style import (
    BLUE,
    DASHED,
    GREEN,
    MUTED,
    PAIR,
    by_layer,
    depth_color,
    depth_scale,
    percent,
)

# Shape letters in this file: L layers, E experts, I expert width.

POINTS = 80  # of a curve


def contributions(contribution_LEI: NDArray[np.float32], chosen: Sequence[Sequence[int]]) -> Figure:
    """What the best units hold, and what a shared expert of an expert's width can take.

    Args:
        contribution_LEI: of every unit, not negative.
        chosen: the experts taken in each layer.
    """
    num_layers, num_experts, width = contribution_LEI.shape
    figure = Figure(figsize=PAIR)
    left, right = figure.subplots(1, 2)
    counts = np.unique(np.geomspace(1, num_experts * width, POINTS).astype(np.int64))
    for index, contribution_EI in enumerate(contribution_LEI):
        held = np.cumsum(np.sort(contribution_EI, axis=None)[::-1], dtype=np.float64)
        share = held[counts - 1] / (held[-1] or 1.0)
        left.plot(counts, share, color=depth_color(index, num_layers), lw=1.3, alpha=0.85)
    left.plot(counts, counts / counts[-1], color=MUTED, lw=1.2, ls=DASHED, label="all equal")
    left.axvline(width, color=MUTED, lw=1)
    left.annotate(
        "one expert's width", (width, 0.97), (-4, 0), textcoords="offset points", color=MUTED,
        size=9, ha="right", va="top", rotation=90,
    )  # fmt: skip
    left.set(xscale="log", xlim=(1, counts[-1]), ylim=(0, 1.02))
    left.set(xlabel="hidden units, best first", title="Contribution held by the best units")
    left.legend(loc="upper left")
    percent(left.yaxis)
    depth_scale(figure, left, num_layers)
    by_layer(
        right,
        [
            ("of all experts", GREEN, _shares(contribution_LEI, [range(num_experts)] * num_layers)),
            ("of the chosen experts", BLUE, _shares(contribution_LEI, chosen)),
        ],
    )
    right.axhline(1 / num_experts, color=MUTED, lw=1.2, ls=DASHED)
    right.set(title="Held by as many units as an expert has")
    right.set_ylim(0, None)
    percent(right.yaxis)
    return figure


def _shares(contribution_LEI: NDArray[np.float32], experts: Sequence[Sequence[int]]) -> list[float]:
    width = contribution_LEI.shape[2]
    pairs = zip(contribution_LEI, experts, strict=True)
    return [
        share_of_best(contribution_EI, candidates, width) for contribution_EI, candidates in pairs
    ]
