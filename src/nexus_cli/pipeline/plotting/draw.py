"""Panels on matplotlib axes. No pyplot: no global state, no display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nexus_cli.pipeline.plotting.panels import Figure, Panel
from nexus_cli.pipeline.plotting.series import (
    MAX_POINTS,
    Run,
    Series,
    event_steps,
    extract,
    smooth,
    thin,
    window_of,
)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
INK, FAINT = "#222222", "#8a8a8a"
EVENTS = {"checkpoint": "v", "sfa": "D", "resume": "o"}  # markers
EVENT_HEIGHTS = {"checkpoint": 1.03, "sfa": 1.075, "resume": 1.03}  # of the axes
TICK_STEPS = [1, 2, 2.5, 5, 10]
EVENT_NAMES = {"checkpoint": "checkpoint", "sfa": "anchor merge (SFA)", "resume": "resumed"}
STYLES = ("-", "--", ":")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 20,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "nexus",
    "svg.fonttype": "path",
}


def draw_figure(figure: Figure, runs: Sequence[Run], window: int, folder: Path) -> list[Path]:
    """Write ``<name>.png`` and ``<name>.svg`` with all panels of a figure."""
    columns = 3 if len(figure.panels) in (3, 5, 6, 9) else min(2, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(4.6 * columns, 3.0 * rows + 0.75), layout="constrained")
        FigureCanvasAgg(canvas)
        grid = canvas.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(figure.panels) :]:
            axes.remove()
        for panel, axes in zip(figure.panels, grid.flat, strict=False):
            draw_panel(axes, panel, runs, window)
        canvas.suptitle(figure.title, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
        _legend(canvas, runs)
        return save(canvas, folder / figure.name)


def draw_single(panel: Panel, runs: Sequence[Run], window: int, path: Path) -> Path:
    """Write one panel as SVG, for a page that arranges panels itself."""
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(4.8, 3.1), layout="constrained")
        FigureCanvasAgg(canvas)
        draw_panel(canvas.subplots(), panel, runs, window)
        canvas.savefig(path, format="svg", metadata={"Date": None})
    return path


def save(canvas: Canvas, stem: Path) -> list[Path]:
    """The same picture as PNG and SVG; without a date, so that equal pictures are equal files."""
    png, svg = stem.with_suffix(".png"), stem.with_suffix(".svg")
    canvas.savefig(png, format="png", dpi=150, metadata={"Software": None})
    canvas.savefig(svg, format="svg", metadata={"Date": None})
    return [png, svg]


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run], window: int) -> None:
    """One measure of every run."""
    values: list[float] = []
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        for key, style in zip(panel.keys, STYLES, strict=False):
            curve = extract(run.records, key)
            if len(curve):
                _draw_curve(axes, curve, colour, style, window if panel.smooth else 1)
                values += curve.values_P[~np.isnan(curve.values_P)].tolist()
        _draw_events(axes, run, colour if len(runs) > 1 else FAINT)
        if panel.clips:
            _draw_clips(axes, run, panel)
    axes.set_title(panel.title + _clipped_share(panel, runs))
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=6, steps=TICK_STEPS, integer=True, min_n_ticks=1)
    )
    positive = [value for value in values if value > 0]
    if panel.log and positive and len(positive) == len(values):
        if max(positive) > 50 * min(positive):
            axes.set_yscale("log")
    elif axes.get_yscale() != "log":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=TICK_STEPS))
    if len(panel.labels) > 1:
        _label_lines(axes, panel, runs)


def _draw_curve(axes: Axes, curve: Series, colour: str, style: str, window: int) -> None:
    window = window_of(curve, window)
    points = curve.steps_P[1:] - curve.steps_P[:-1]
    smoothing = window > 1 and bool((points < window).any())
    faint = 0.28 if smoothing else 1.0
    if len(curve) > MAX_POINTS:
        band = thin(curve)
        axes.fill_between(band.steps_B, band.low_B, band.high_B, color=colour, alpha=0.2, lw=0)
        line = thin(smooth(curve, window)) if smoothing else band
        axes.plot(line.steps_B, line.mean_B, style, color=colour, lw=1.6)
    else:
        few = len(curve) <= 40
        axes.plot(
            curve.steps_P,
            curve.values_P,
            style if not smoothing else "-",
            color=colour,
            alpha=faint,
            lw=1.0 if smoothing else 1.6,
            marker="o" if few or _isolated(curve) else None,
            markersize=3.2 if few else 2.0,
            markeredgewidth=0,
        )
        if smoothing:
            axes.plot(curve.steps_P, smooth(curve, window).values_P, style, color=colour, lw=1.8)
    gaps = curve.gaps
    if len(gaps):
        axes.plot(
            gaps, np.zeros(len(gaps)), "x", color="#c00000", ms=5, mew=1.4, clip_on=False,
            transform=axes.get_xaxis_transform(), zorder=5,
        )  # fmt: skip


def _isolated(curve: Series) -> bool:
    """Whether a point stands between gaps, where a line would not show it."""
    gap = np.concatenate([[True], np.isnan(curve.values_P), [True]])
    return bool((gap[:-2] & ~gap[1:-1] & gap[2:]).any())


def _draw_events(axes: Axes, run: Run, colour: str) -> None:
    """Small marks above the axes: lines through the curves would hide them."""
    for kind, marker in EVENTS.items():
        steps = event_steps(run.records, kind)
        if not steps:
            continue  # an empty artist has no box, which upsets the layout
        axes.plot(
            steps, [EVENT_HEIGHTS[kind]] * len(steps), marker, color=colour, ms=4.0, mew=0.8,
            mfc="white" if kind == "resume" else colour, clip_on=False,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _draw_clips(axes: Axes, run: Run, panel: Panel) -> None:
    """A cross on every clipped step, where they are few enough to be seen."""
    curve, clipped = extract(run.records, panel.keys[0]), extract(run.records, "clipped")
    if len(curve) > MAX_POINTS or len(clipped) != len(curve):
        return
    hit = clipped.values_P > 0
    axes.plot(curve.steps_P[hit], curve.values_P[hit], "x", color=INK, ms=4, mew=0.9)


def _clipped_share(panel: Panel, runs: Sequence[Run]) -> str:
    if not panel.clips:
        return ""
    clipped = np.concatenate([extract(run.records, "clipped").values_P for run in runs])
    return f" (x: clipped, {np.nanmean(clipped):.0%} of steps)" if len(clipped) else ""


def _label_lines(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """Name the line styles of a panel with several measures."""
    drawn = [any(len(extract(run.records, key)) for run in runs) for key in panel.keys]
    colour = COLOURS[0] if len(runs) == 1 else INK
    handles = [
        Line2D([], [], color=colour, ls=style, label=label)
        for style, label, there in zip(STYLES, panel.labels, drawn, strict=False)
        if there
    ]
    if len(handles) > 1:
        axes.legend(handles=handles, loc="best")


def _legend(canvas: Canvas, runs: Sequence[Run]) -> None:
    """Runs and events, once for the whole figure, below the panels."""
    handles = []
    if len(runs) > 1:
        handles = [
            Line2D([], [], color=COLOURS[number % len(COLOURS)], lw=2, label=run.label)
            for number, run in enumerate(runs)
        ]
    for kind, marker in EVENTS.items():
        if any(event_steps(run.records, kind) for run in runs):
            fill = "white" if kind == "resume" else FAINT
            handles.append(
                Line2D([], [], color=FAINT, ls="", marker=marker, mfc=fill, ms=5,
                       label=EVENT_NAMES[kind])
            )  # fmt: skip
    if handles:
        canvas.legend(handles=handles, loc="outside lower left", ncols=min(6, len(handles)))
