"""Layers by experts: importance, selection, usage; experts by experts: correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from nexus_cli.core.router.analysis import METHODS, LayerAnalysis, Method
from nexus_cli.pipeline.pca_plots.style import (
    BLUE,
    DIVERGING,
    GREEN,
    HEAT,
    INK,
    ORANGE,
    heatmap,
    matrix_size,
    percent,
    whole_numbers,
)

# Shape letters in this file: L layers, E experts.

MOST_MARKED_CELLS = 1200  # more marks than that hide what they mark
FEW_CELLS = 300
SIDE = 2.6  # inches of the panel beside a matrix
NARROW = 1.4  # of a second one
SHOWN_COMPONENTS = 10
WIDEST = 4.0  # of the usage scale, in powers of two


def importance(layers: Sequence[LayerAnalysis], method: Method) -> Figure:
    """Each expert's share of its layer's importance."""
    importance_LE = np.stack([layer.importance_E for layer in layers])
    total_L1 = importance_LE.sum(axis=1, keepdims=True)
    share_LE = importance_LE / np.where(total_L1 > 0, total_L1, 1.0)
    width, height = matrix_size(*share_LE.shape)
    figure = Figure(figsize=(width + 1.2, height))
    axes = figure.subplots()
    heatmap(figure, axes, share_LE, HEAT, "share of the layer's importance", (0.0, None))
    title = "Importance of every expert"
    if share_LE.size <= MOST_MARKED_CELLS:
        for row, layer in enumerate(layers):
            taken = layer.selections[method].experts_T
            size = 9 if share_LE.size > FEW_CELLS else 30
            axes.scatter(taken, np.full(len(taken), row), s=size, color=ORANGE, linewidths=0)
        title += f" (dots: selected by '{method}')"
    axes.set_title(title)
    return figure


def selection(layers: Sequence[LayerAnalysis], method: Method) -> Figure:
    """Which experts were taken, in which order, and what they explain."""
    num_layers, num_experts = len(layers), len(layers[0].usage_E)
    counts = [len(layer.selections[method].experts_T) for layer in layers]
    count, adaptive = max(counts), len(set(counts)) > 1
    order_LE = np.full((num_layers, num_experts), np.nan)
    for index, layer in enumerate(layers):
        order_LE[index, layer.selections[method].experts_T] = np.arange(1, counts[index] + 1)
    panels = (SIDE, NARROW) if adaptive else (SIDE,)
    figure, (matrix, side, *more) = _with_side_panels(num_layers, num_experts, panels)
    shades = ListedColormap(HEAT.reversed()(np.linspace(0.0, 0.72, max(2, count))))
    bar = heatmap(figure, matrix, order_LE, shades, "order", (0.5, max(2, count) + 0.5))
    whole_numbers(bar.ax.yaxis)
    matrix.set_title(f"Experts selected by '{method}'")
    marks = {"diverse": (BLUE, "o"), "pca": (ORANGE, "s"), "activation": (GREEN, "^")}
    for other, aside in zip(METHODS, (-0.22, 0.0, 0.22), strict=True):
        # a little above each other, or one method's mark would hide another's
        color, marker = marks[other]
        explained = [layer.explained[other] for layer in layers]
        places = np.arange(num_layers) + aside
        side.plot(
            explained, places, marker, color=color, ms=4, alpha=0.9, label=other, clip_on=False
        )
    side.set_xlim(None, min(1.0, side.get_xlim()[1]))
    side.set_title("Variance explained")
    side.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10], min_n_ticks=2))
    percent(side.xaxis)
    for panel in more:
        panel.barh(range(num_layers), counts, color=BLUE, height=0.7)
        panel.set_title("Experts taken")
        panel.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=2))
    figure.legend(loc="outside lower right", ncols=3, handletextpad=0.1, columnspacing=1.2)
    return figure


def usage(layers: Sequence[LayerAnalysis]) -> Figure:
    """How far each expert's applied weight is from an even share."""
    usage_LE = np.stack([layer.usage_E for layer in layers])
    num_layers, num_experts = usage_LE.shape
    ratio_LE = np.log2(np.maximum(usage_LE * num_experts, 2.0**-WIDEST))  # 0: an even share
    limit = float(np.clip(np.abs(ratio_LE).max(), 1.0, WIDEST))
    figure, (matrix, side) = _with_side_panels(num_layers, num_experts, (SIDE,))
    label = "log2 of even shares"
    heatmap(figure, matrix, ratio_LE, DIVERGING, label, (-limit, limit))
    matrix.set_title("Usage: mean weight applied to each expert")
    logarithm_LE = np.log(np.maximum(usage_LE, np.finfo(np.float64).tiny))
    effective_L = np.exp(-(usage_LE * logarithm_LE).sum(axis=1))
    side.plot(effective_L, range(num_layers), "o-", color=BLUE, ms=3.5, lw=1.4)
    side.set(title="Effective experts", xlabel="exp(entropy of usage)")
    side.set_xlim(0, num_experts * 1.03)
    side.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def components(layers: Sequence[LayerAnalysis]) -> Figure:
    """The share of each layer's variance in each of its first components."""
    ratio_LC = np.stack([layer.components.variance_ratio()[:SHOWN_COMPONENTS] for layer in layers])
    _, height = matrix_size(*ratio_LC.shape)
    figure = Figure(figsize=(7.5, height))
    axes = figure.subplots()
    strongest = float(ratio_LC.max()) or 1.0
    heatmap(figure, axes, ratio_LC, HEAT, "share of the layer's variance", (0.0, strongest))
    for (row, column), share in np.ndenumerate(ratio_LC):
        ink = "white" if share > 0.55 * strongest else INK
        axes.text(column, row, f"{share:.0%}", ha="center", va="center", size=8, color=ink)
    axes.set(xlabel="component", title="Variance of the first components, by layer")
    axes.set_xticks(range(ratio_LC.shape[1]), [str(c + 1) for c in range(ratio_LC.shape[1])])
    return figure


def correlations(layers: Sequence[LayerAnalysis], method: Method) -> Figure:
    """Up to six layers from first to last, experts ordered by family."""
    shown = sorted({round(i) for i in np.linspace(0, len(layers) - 1, min(6, len(layers)))})
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(6.5, 3.7 * columns + 0.9), 4.1 * rows + 0.3))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    limit = _strongest([layers[index] for index in shown])
    images = [
        _correlation(axes, index, layers[index], method, limit)
        for axes, index in zip(grid.flat, shown, strict=False)
    ]
    figure.colorbar(images[0], ax=grid, shrink=0.7, label="correlation", extend="both")
    title = f"Experts ordered by family (boxes); marks below: selected by '{method}'"
    figure.suptitle(title, x=0.01, ha="left", size=11)
    return figure


def _strongest(layers: Sequence[LayerAnalysis]) -> float:
    """A colour limit that shows the bulk of the correlations between different experts."""
    apart = ~np.eye(len(layers[0].usage_E), dtype=bool)
    strength = np.concatenate([np.abs(layer.correlation_EE[apart]) for layer in layers])
    return float(np.clip(np.percentile(strength, 99.5), 0.1, 1.0)) if len(strength) else 1.0


def _correlation(
    axes: Axes, index: int, layer: LayerAnalysis, method: Method, limit: float
) -> AxesImage:
    order_E = layer.families.order_E
    ordered_EE = layer.correlation_EE[np.ix_(order_E, order_E)]
    image = axes.imshow(
        ordered_EE, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest"
    )
    label_E = layer.families.label_E[order_E]
    for label in np.unique(label_E):
        start, size = int((label_E == label).argmax()), int((label_E == label).sum())
        if size > 1:
            corner = (start - 0.5, start - 0.5)
            axes.add_patch(Rectangle(corner, size, size, fill=False, ec=INK, lw=1.1))
    marked = np.flatnonzero(np.isin(order_E, layer.selections[method].experts_T))
    below = np.full(len(marked), -0.025)
    place = axes.get_xaxis_transform()  # x in experts, y in heights of the matrix
    axes.plot(marked, below, "|", color=ORANGE, ms=5, clip_on=False, transform=place)
    found = len(layer.families.groups())
    axes.set_title(f"layer {index}: {found} {'family' if found == 1 else 'families'}")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return image


def _with_side_panels(
    num_layers: int, num_experts: int, widths: Sequence[float]
) -> tuple[Figure, list[Axes]]:
    """A matrix, and beside it panels with the same layers, their ``widths`` in inches."""
    width, height = matrix_size(num_layers, num_experts)
    figure = Figure(figsize=(width + sum(widths) + 0.6, height))
    ratios = (width, *widths)
    return figure, list(figure.subplots(1, len(ratios), width_ratios=ratios, sharey=True))
