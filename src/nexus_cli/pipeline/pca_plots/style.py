"""How the plots of ``nexus pca`` look, and the pieces that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure  # without pyplot: no window system, no global state
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

DPI = 110
PAIR = (11, 4.4)  # inches, of two panels side by side
DASHED = (0, (4, 3))
INK, MUTED, GRID = "#22303c", "#6b7a87", "#e4e9ed"
BLUE, ORANGE, GREEN, PURPLE = "#2166ac", "#d9722e", "#2f8f6b", "#7a5aa6"
DEPTH = mpl.colormaps["viridis"]
HEAT = LinearSegmentedColormap.from_list("heat", ["#f5f8fa", "#a6cbe3", "#2f7fb8", "#0b2f57"])
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ["#b1572a", "#f7e3d3", "#f7f9fa", "#cfe2f0", "#2166ac"]
)
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def house_style() -> AbstractContextManager[None]:
    """Matplotlib settings for the duration of a block."""
    return mpl.rc_context(STYLE)


def heatmap(
    figure: Figure,
    axes: Axes,
    values_LE: NDArray[Any],
    colors: Colormap,
    label: str,
    limits: tuple[float, float | None],
) -> Colorbar:
    """A layers-by-experts matrix with its colour scale, which is returned."""
    low, high = limits
    image = axes.imshow(
        values_LE, cmap=colors, aspect="auto", interpolation="nearest", vmin=low, vmax=high
    )
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.015, aspect=28, fraction=0.05)
    axes.set(xlabel="expert", ylabel="layer")
    axes.grid(visible=False)
    whole_numbers(axes.xaxis, axes.yaxis)
    return bar


def matrix_size(num_layers: int, num_experts: int) -> tuple[float, float]:
    """Inches for a layers-by-experts matrix: cells stay legible, the page stays a page."""
    return min(14.0, max(5.5, 0.16 * num_experts)), min(14.0, max(3.0, 0.2 * num_layers + 1.4))


def by_layer(axes: Axes, curves: Sequence[tuple[str, str, Sequence[float]]]) -> None:
    """Curves over the layers: (label, colour, values)."""
    for label, color, values in curves:
        axes.plot(range(len(values)), values, "o-", ms=3.5, lw=1.5, color=color, label=label)
    layer_axis(axes, len(curves[0][2]) if curves else 1)
    if curves:
        legend_below(axes)


def layer_axis(axes: Axes, num_layers: int) -> None:
    """Layers along x, and no more of them than there are."""
    axes.set(xlabel="layer", xlim=(-0.5, max(0.5, num_layers - 0.5)))
    whole_numbers(axes.xaxis)


def legend_below(axes: Axes) -> None:
    """One row under the axes, where it hides nothing."""
    axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def depth_scale(figure: Figure, axes: Axes, num_layers: int) -> None:
    """Explain the colours that :func:`depth_color` gives, if there are several."""
    if num_layers == 1:
        return
    scale = ScalarMappable(norm=Normalize(0, num_layers - 1), cmap=DEPTH)
    bar = figure.colorbar(scale, ax=axes, label="layer", pad=0.02, aspect=28)
    whole_numbers(bar.ax.yaxis)


def depth_color(layer: int, num_layers: int) -> Any:
    """Dark for the first layers, light for the last."""
    return DEPTH(layer / max(1, num_layers - 1))


def percent(axis: Axis) -> None:
    """Ticks as percentages of one, without decimals."""
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def whole_numbers(*axes: Axis) -> None:
    """Ticks at integers only."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
