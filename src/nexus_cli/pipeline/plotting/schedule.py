"""The schedules of a run that has yet to start: every value of every step, and their picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nexus_cli.core.distill.schedule import Schedule, Stage
from nexus_cli.core.train.loop import scaled_rates
from nexus_cli.core.train.optim import Rates
from nexus_cli.pipeline.plotting.draw import COLOURS, INK, STYLE, STYLES, TICK_STEPS, save
from nexus_cli.pipeline.plotting.series import Floats

# N steps of the run.

NAME = "schedule"
GROUPS = {
    "shared experts": "shared",
    "gates": "gate",
    "routers": "router",
    "router biases": "router_bias",
}
STAGE_NAMES: Mapping[Stage, str] = {"warmup": "warm-up", "stable": "stable", "decay": "decay"}
TINTS: Mapping[Stage, str] = {"warmup": "#fbeed6", "stable": "#dff0e8", "decay": "#e6edf7"}
LINES = (*STYLES, "-.")
FREEZE = (0, (4, 2))  # dashes
BOX: Any = {"frameon": True, "framealpha": 0.8, "edgecolor": "none"}
LOG_SPAN = 50  # as in the plots of runs: a logarithmic axis where values span more


@dataclass(frozen=True)
class Timeline:
    """What each optimizer step of a run will use; steps count from 1, as in ``metrics.jsonl``.

    Attributes:
        steps_N: 1 to N.
        rates: learning rates ``[N]`` by group; 0 where a group stands still.
        temperature_N: of the KL.
        kl: weights of the KL ``[N]``, by the text that has them.
        stages: each stage with its first and its last step.
        frozen_after: the last step that moves the router biases; ``None`` if none is frozen.
    """

    steps_N: Floats
    rates: Mapping[str, Floats]
    temperature_N: Floats
    kl: Mapping[str, Floats]
    stages: Sequence[tuple[Stage, int, int]]
    frozen_after: int | None

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        peak: Rates,
        kl_weights: Mapping[str, float],
        groups: Collection[str],
    ) -> Timeline:
        """Ask the schedule what the training loop will ask it.

        Args:
            schedule: of the run.
            peak: largest learning rates.
            kl_weights: largest KL weight, by the text that has it.
            groups: those of :data:`GROUPS` that train.
        """
        values = [schedule.at(step) for step in range(schedule.total_steps)]
        scaled = [scaled_rates(peak, value) for value in values]
        steps = np.arange(1, len(values) + 1, dtype=float)
        kd_scale_N = np.array([value.kd_scale for value in values])
        freeze = schedule.router_bias_freeze_step
        if "router biases" not in groups or (freeze is not None and freeze >= len(values)):
            freeze = None
        return cls(
            steps_N=steps,
            rates={
                label: np.array([getattr(rates, name) for rates in scaled])
                for label, name in GROUPS.items()
                if label in groups
            },
            temperature_N=np.array([value.temperature for value in values]),
            kl={label: weight * kd_scale_N for label, weight in kl_weights.items()},
            stages=_stages([value.stage for value in values]),
            frozen_after=freeze,
        )

    @property
    def turns(self) -> list[int]:
        """Steps worth a line in a table: ends of the stages, and where the biases freeze."""
        ends = {step for _, first, last in self.stages for step in (first, last)}
        freeze = () if self.frozen_after is None else (self.frozen_after, self.frozen_after + 1)
        return sorted((ends | set(freeze)) - {0})


def _stages(stages: Sequence[Stage]) -> list[tuple[Stage, int, int]]:
    found, last = [], 0
    for stage, members in groupby(stages):
        first, last = last + 1, last + sum(1 for _ in members)
        found.append((stage, first, last))
    return found


def draw_schedule(timeline: Timeline, title: str, folder: Path) -> list[Path]:
    """Write ``schedule.png`` and ``schedule.svg``."""
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(13.8, 3.75), layout="constrained")
        FigureCanvasAgg(canvas)
        rates, temperature, kl = canvas.subplots(1, 3)
        _draw_lines(rates, timeline, timeline.rates, "Learning rates")
        _scale_rates(rates, timeline)
        _draw_lines(
            temperature, timeline, {"temperature": timeline.temperature_N}, "Temperature of kd"
        )
        _draw_lines(kl, timeline, timeline.kl, "Weight of kd")
        for axes in (temperature, kl):
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=TICK_STEPS))
        canvas.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
        _legend(canvas, timeline)
        return save(canvas, folder / NAME)


def _draw_lines(axes: Axes, timeline: Timeline, curves: Mapping[str, Floats], title: str) -> None:
    """Stages behind, one line a curve; what is 0 has no line, as nothing moves there."""
    for stage, first, last in timeline.stages:
        axes.axvspan(first - 0.5, last + 0.5, color=TINTS[stage], lw=0, zorder=0)
    marker = "o" if len(timeline.steps_N) <= 40 else None
    merged = _merged(curves)
    for number, (label, values_N) in enumerate(merged.items()):
        moving_N = np.where(values_N > 0, values_N, np.nan)
        axes.plot(
            timeline.steps_N, moving_N, LINES[number % len(LINES)], label=label,
            color=COLOURS[number % len(COLOURS)], lw=1.8, marker=marker, markersize=3.2,
        )  # fmt: skip
    axes.set_title(title, pad=8)
    axes.set_xlabel("step")
    axes.set_xlim(0.5, len(timeline.steps_N) + 0.5)
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=6, steps=TICK_STEPS, integer=True, min_n_ticks=1)
    )
    if len(merged) > 1:
        axes.legend(loc="best", **BOX)


def _merged(curves: Mapping[str, Floats]) -> dict[str, Floats]:
    """Equal curves as one, named after all: one line would hide the others."""
    names: dict[bytes, list[str]] = {}
    for label, values_N in curves.items():
        names.setdefault(values_N.tobytes(), []).append(label)
    return {" and ".join(labels): curves[labels[0]] for labels in names.values()}


def _scale_rates(axes: Axes, timeline: Timeline) -> None:
    """The freeze of the biases, and a logarithmic axis where one is needed."""
    if timeline.frozen_after is not None:
        axes.axvline(timeline.frozen_after + 0.5, color=INK, lw=1.0, ls=FREEZE)
    values = np.concatenate([values_N[values_N > 0] for values_N in timeline.rates.values()])
    span = values.max() / values.min()
    if span > LOG_SPAN:
        axes.set_yscale("log")
        axes.set_ylim(bottom=values.min() / span**0.28)  # room for the legend, below every curve
        axes.legend(loc="lower right", ncols=2, **BOX)
    else:
        axes.set_ylim(bottom=0)


def _legend(canvas: Canvas, timeline: Timeline) -> None:
    """What the shades mean, once for the whole figure, below the panels."""
    handles: list[Patch | Line2D] = [
        Patch(color=TINTS[stage], label=f"{STAGE_NAMES[stage]}: {_span(first, last)}")
        for stage, first, last in timeline.stages
    ]
    if timeline.frozen_after is not None:
        handles.append(
            Line2D([], [], color=INK, lw=1.0, ls=FREEZE,
                   label=f"router biases freeze after step {timeline.frozen_after:,}")
        )  # fmt: skip
    canvas.legend(handles=handles, loc="outside lower left", ncols=len(handles))


def _span(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
