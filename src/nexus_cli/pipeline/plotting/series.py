"""Curves from metrics records: gaps kept, smoothing by step, honest thinning of long runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

# P points of a curve   B bins of a thinned curve

MAX_POINTS = 800
LARGEST_SHARE = 5  # a window is at most this fraction of a run

Record = Mapping[str, Any]
Key = str | tuple[str, ...]  # a name, or names from the outermost object inwards
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One training to draw.

    Attributes:
        label: Its name in legends.
        records: Its metrics.
        settings: Settings by dotted name, for the report.
    """

    label: str
    records: Sequence[Record]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """A measure by step, ascending; NaN where it was not a finite number."""

    steps_P: Floats
    values_P: Floats

    def __len__(self) -> int:
        return len(self.steps_P)

    @property
    def gaps(self) -> Floats:
        """Steps at which the value was not finite."""
        return self.steps_P[np.isnan(self.values_P)]

    @property
    def constant(self) -> float | None:
        """The one value that the measure has throughout, if so."""
        finite = self.values_P[~np.isnan(self.values_P)]
        return float(finite[0]) if len(finite) and np.ptp(finite) == 0 else None


@dataclass(frozen=True)
class Band:
    """Smallest, mean and largest value of each of B bins of a long curve."""

    steps_B: Floats
    low_B: Floats
    mean_B: Floats
    high_B: Floats


def extract(records: Sequence[Record], key: Key) -> Series:
    """The values under ``key``; of two records of a step the later one counts.

    Records without the key are left out: nothing was measured there. ``null`` is a gap.
    """
    found: dict[int, float] = {}
    for record in records:
        missing, value = _look_up(record, (key,) if isinstance(key, str) else key)
        if not missing and (value is None or isinstance(value, (int, float))):
            found[record["step"]] = float("nan") if value is None else float(value)
    steps = sorted(found)
    return Series(np.array(steps, dtype=float), np.array([found[s] for s in steps], dtype=float))


def _look_up(record: Any, path: Sequence[str]) -> tuple[bool, Any]:
    for name in path:
        if not isinstance(record, Mapping) or name not in record:
            return True, None
        record = record[name]
    return False, record


def event_steps(records: Sequence[Record], kind: str) -> list[int]:
    """Steps at which an event of this kind was recorded."""
    return sorted({record["step"] for record in records if record.get("event") == kind})


def eval_names(records: Sequence[Record]) -> list[str]:
    """Names of the texts that the run was evaluated on, in the order of their appearance."""
    names: dict[str, None] = {}
    for record in records:
        if isinstance(record.get("eval"), Mapping):
            names |= dict.fromkeys(record["eval"])
    return list(names)


def window_of(series: Series, window: int) -> int:
    """``window`` steps, or a fifth of the curve's span where that is less."""
    if len(series) < 2:
        return 1
    span = int(series.steps_P[-1] - series.steps_P[0])
    return max(1, min(window, span // LARGEST_SHARE))


def smooth(series: Series, window: int) -> Series:
    """The mean over ``window`` steps around each point.

    Near an end the window shrinks to half: less would be noise, more would bend a slope.
    Gaps stay gaps, and lend nothing to their neighbours.
    """
    steps_P, finite_P = series.steps_P, ~np.isnan(series.values_P)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite_P, series.values_P, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite_P)])
    to_end_P = np.minimum(steps_P - steps_P[:1], steps_P[-1:] - steps_P)
    half_P = np.clip(to_end_P, window / 4, window / 2)
    first_P = np.searchsorted(steps_P, steps_P - half_P, side="left")
    last_P = np.searchsorted(steps_P, steps_P + half_P, side="right")
    total_P, count_P = sums[last_P] - sums[first_P], counts[last_P] - counts[first_P]
    mean_P = np.full(len(steps_P), np.nan)
    np.divide(total_P, count_P, out=mean_P, where=finite_P & (count_P > 0))
    return Series(steps_P, mean_P)


def thin(series: Series, bins: int = MAX_POINTS) -> Band:
    """A long curve as the range and the mean of equal numbers of points: no spike is lost."""
    size = len(series)
    edges = np.linspace(0, size, min(bins, size) + 1).astype(int)
    parts = [slice(a, b) for a, b in pairwise(edges)]
    steps_B = np.array([series.steps_P[part].mean() for part in parts])
    finite = [v[~np.isnan(v)] for v in (series.values_P[part] for part in parts)]
    low_B, mean_B, high_B = (
        np.array([float(f(v)) if len(v) else np.nan for v in finite])
        for f in (np.min, np.mean, np.max)
    )
    return Band(steps_B, low_B, mean_B, high_B)
