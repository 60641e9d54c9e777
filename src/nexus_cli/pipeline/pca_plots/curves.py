"""Curves: variance explained, how importance is spread, how sure the router is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nexus_cli.core.router.analysis import LayerAnalysis
from nexus_cli.core.router.distribution import PERCENTILES
from nexus_cli.pipeline.pca_plots.style import (
    BLUE,
    DASHED,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAIR,
    PURPLE,
    by_layer,
    depth_color,
    depth_scale,
    layer_axis,
    legend_below,
    percent,
    whole_numbers,
)

# Shape letters in this file: L layers, E experts, R sampled tokens.

MOST_COMPONENTS = 40  # beyond these the curves are flat
MOST_TOKENS = 1024
FAINTEST = 1e-5  # of the strongest importance; what is less is drawn there


def variance(layers: Sequence[LayerAnalysis]) -> Figure:
    """How few components describe each layer's router."""
    figure = Figure(figsize=PAIR)
    left, right = figure.subplots(1, 2)
    shown = min(len(layers[0].usage_E), MOST_COMPONENTS)
    for index, layer in enumerate(layers):
        held = np.cumsum(layer.components.variance_ratio())[:shown]
        color = depth_color(index, len(layers))
        left.plot(np.arange(1, shown + 1), held, color=color, lw=1.3, alpha=0.85)
    left.axhline(0.9, color=MUTED, lw=1, ls=DASHED)
    left.annotate("90%", (1, 0.9), (4, 2), textcoords="offset points", color=MUTED, size=9)
    left.set(xlabel="components", title="Variance explained, by layer", ylim=(0, 1.02))
    left.set_xlim(1, max(2, shown))
    percent(left.yaxis)
    whole_numbers(left.xaxis)
    depth_scale(figure, left, len(layers))
    shares = ((0.5, GREEN), (0.8, BLUE), (0.9, PURPLE), (0.95, ORANGE))
    by_layer(
        right,
        [(f"{s:.0%}", color, [x.components.needed_for(s) for x in layers]) for s, color in shares],
    )
    right.set(ylabel="components", title="Components needed for a share")
    right.set_ylim(0, None)
    whole_numbers(right.yaxis)
    return figure


def distribution(layers: Sequence[LayerAnalysis]) -> Figure:
    """How much of the importance the most important experts hold, and how it falls with rank."""
    importance_LE = np.sort(np.stack([layer.importance_E for layer in layers]))[:, ::-1]
    figure = Figure(figsize=(PAIR[0], 2 * PAIR[1]))
    (held, share), (rank, spread) = figure.subplots(2, 2)
    _held(held, importance_LE)
    depth_scale(figure, held, len(layers))
    _share_by_layer(share, importance_LE)
    _by_rank(rank, importance_LE)
    depth_scale(figure, rank, len(layers))
    colors = (MUTED, GREEN, BLUE, PURPLE, ORANGE)
    values_PL = np.percentile(importance_LE, PERCENTILES, axis=1)
    curves = zip(PERCENTILES, colors, values_PL.tolist(), strict=True)
    by_layer(spread, [(f"p{p}", color, values) for p, color, values in curves])
    spread.set(title="Percentiles of an expert's importance", ylabel="importance")
    spread.set_ylim(0, None)
    return figure


def _held(axes: Axes, importance_LE: NDArray[np.float64]) -> None:
    held_LE = _held_by_first(importance_LE)
    num_layers, num_experts = held_LE.shape
    ranks = np.arange(1, num_experts + 1)
    for index, held_E in enumerate(held_LE):
        axes.plot(ranks, held_E, color=depth_color(index, num_layers), lw=1.3, alpha=0.85)
    axes.plot(ranks, ranks / num_experts, color=MUTED, lw=1.2, ls=DASHED, label="all equal")
    axes.set(xlabel="experts, most important first", title="Importance held by the top experts")
    axes.set(xlim=(1, max(2, num_experts)), ylim=(0, 1.02))
    axes.legend(loc="lower right")
    whole_numbers(axes.xaxis)
    percent(axes.yaxis)


def _share_by_layer(axes: Axes, importance_LE: NDArray[np.float64]) -> None:
    held_LE = _held_by_first(importance_LE)
    num_experts = held_LE.shape[1]
    sizes = [(4, GREEN), (8, BLUE), (16, PURPLE), (32, ORANGE)]
    curves = [
        (f"top {size}", color, held_LE[:, min(size, num_experts) - 1].tolist())
        for size, color in sizes
        if size == 4 or size < num_experts
    ]
    by_layer(axes, curves)
    axes.set(title="Share of importance, by layer", ylim=(0, 1.02))
    percent(axes.yaxis)


def _by_rank(axes: Axes, importance_LE: NDArray[np.float64]) -> None:
    """Importance on a logarithmic scale, and where it falls most."""
    num_layers, num_experts = importance_LE.shape
    ranks = np.arange(1, num_experts + 1)
    strongest = float(importance_LE.max()) or 1.0
    shown_LE = np.maximum(importance_LE, FAINTEST * strongest)
    for index, shown_E in enumerate(shown_LE):
        color = depth_color(index, num_layers)
        axes.plot(ranks, shown_E, color=color, lw=1.3, alpha=0.85)
        if num_experts > 1:
            gap = int((-np.diff(importance_LE[index])).argmax())
            label = "largest gap" if index == 0 else None
            axes.plot(ranks[gap], shown_E[gap], "v", color=color, ms=6, mec=INK, label=label)
    axes.set(yscale="log", xlim=(0.5, num_experts + 0.5), xlabel="rank", ylabel="importance")
    axes.set_title("Importance by rank")
    if num_experts > 1:
        axes.legend(loc="lower left")
    whole_numbers(axes.xaxis)


def _held_by_first(importance_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    total_L1 = importance_LE.sum(axis=1, keepdims=True)
    held_LE: NDArray[np.float64] = np.cumsum(
        importance_LE / np.where(total_L1 > 0, total_L1, 1.0), axis=1
    )
    return held_LE


def confidence(sample_RLE: NDArray[np.float16]) -> Figure:
    """How sure the router is of single tokens; the moments cannot tell, the sample can."""
    probability_RLE = sample_RLE[:MOST_TOKENS].astype(np.float32)
    logarithm_RLE = np.log(np.maximum(probability_RLE, 1e-12))
    effective_RL = np.exp(-(probability_RLE * logarithm_RLE).sum(-1))
    figure = Figure(figsize=PAIR)
    left, right = figure.subplots(1, 2)
    for axes, values_RL, color, title in (
        (left, probability_RLE.max(-1), BLUE, "Probability of the first choice"),
        (right, effective_RL, ORANGE, "Effective experts of a token, exp(entropy)"),
    ):
        low, quarter, middle, three, high = np.percentile(values_RL, (5, 25, 50, 75, 95), axis=0)
        layers = np.arange(len(middle))
        axes.fill_between(layers, low, high, color=color, alpha=0.15, lw=0, label="5-95% of tokens")
        axes.fill_between(layers, quarter, three, color=color, alpha=0.3, lw=0, label="25-75%")
        axes.plot(layers, middle, "o-", ms=3.5, lw=1.6, color=color, label="median")
        axes.set_title(title)
        layer_axis(axes, len(layers))
        legend_below(axes)
    left.set_ylim(0, 1)
    percent(left.yaxis)
    right.set_ylim(0, None)  # not up to E: of 128 experts, tokens use a few
    return figure
