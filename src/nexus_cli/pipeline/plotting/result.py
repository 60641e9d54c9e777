"""The one picture of a result: perplexity before and after, and what it cost elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from nexus_cli.pipeline.plotting.draw import FAINT, INK, STYLE, save

BASE, MODEL = "#b8b8b8", "#0072B2"
ROWS = (
    ("domain_perplexity", "Domain text"),
    ("argument_value_perplexity", "Argument values of tool calls"),
    ("general_perplexity", "General text"),
)


def draw_result(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``result.png`` and ``result.svg``; nothing if no perplexity was measured."""
    summary = report["summary"]
    rows = [(title, pair) for key, title in ROWS if (pair := complete(summary.get(key)))]
    if not rows:
        return []
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 0.95 * len(rows) + 0.95), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots(len(rows), 1, squeeze=False)
        for (title, pair), place in zip(rows, axes.flat, strict=True):
            _draw_pair(place, title, *pair)
        canvas.suptitle(
            "Perplexity on held-out text (lower is better)",
            x=0.012, ha="left", fontsize=11.5, fontweight="bold",
        )  # fmt: skip
        canvas.supxlabel(_footer(summary), x=0.012, ha="left", fontsize=8.5, color=INK)
        return save(canvas, folder / "result")


def complete(pair: Any) -> tuple[float, float] | None:
    """Base and model, if both were measured and are finite."""
    if not isinstance(pair, Mapping) or None in (pair.get("base"), pair.get("model")):
        return None
    return float(pair["base"]), float(pair["model"])


def change(base: float, model: float) -> str:
    """The relative change, with a sign."""
    return f"{(model / base - 1):+.1%}"


def number(perplexity: float) -> str:
    """Two decimals, or four figures of a large one."""
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.4g}"


def _draw_pair(axes: Axes, title: str, base: float, model: float) -> None:
    bars = axes.barh([1, 0], [base, model], color=[BASE, MODEL], height=0.72)
    for bar, value, extra in zip(bars, (base, model), ("", change(base, model)), strict=True):
        text = number(value) + (f"   {extra}" if extra else "")
        axes.annotate(
            text, (value, bar.get_y() + bar.get_height() / 2), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=9,
            fontweight="bold" if extra else "normal",
        )  # fmt: skip
    axes.set_title(title, pad=3)
    axes.set_yticks([1, 0], ["base", "with the shared expert"])
    axes.set_xlim(0, 1.22 * max(base, model))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color(FAINT)


def _footer(summary: Mapping[str, Any]) -> str:
    parts = []
    if summary.get("kl_to_base") is not None:
        parts.append(f"KL to the base on general text: {summary['kl_to_base']:.4f} nats a token")
    trained, total = summary.get("trained_parameters"), summary.get("total_parameters")
    if trained and total:
        parts.append(f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})")
    return "   |   ".join(parts)
