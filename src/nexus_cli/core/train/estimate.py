"""How long the rest of a run will take, from what its parts have taken."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

ENOUGH = 5  # steps, after which a run is told how long it will take
WARM_UP = 1  # steps that compile, allocate and capture, and say nothing about the others


@dataclass
class Durations:
    """Seconds that the parts of a run took in this process, in order.

    Attributes:
        steps: optimizer steps, without the evaluations and checkpoints after them.
        evaluations: of held-out text.
        checkpoints: saved.
        improved: of every evaluation after a step, whether it was the best so far.
    """

    steps: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    checkpoints: list[float] = field(default_factory=list)
    improved: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Remaining:
    """How many of its parts a run still has before it.

    Attributes:
        steps: optimizer steps.
        evaluations: of held-out text.
        checkpoints: that fall due whatever the evaluations find.
        chances: evaluations after which a new best costs a checkpoint that was not due.
    """

    steps: int
    evaluations: int
    checkpoints: int
    chances: int = 0

    @classmethod
    def of(
        cls,
        step: int,
        max_steps: int,
        *,
        evaluate_every: int | None,
        save_every: int | None,
        keeps_best: bool = False,
    ) -> Remaining:
        """After ``step`` of ``max_steps``; the last step is always evaluated and saved.

        Args:
            step: optimizer steps taken, with what fell due after them.
            max_steps: of the run.
            evaluate_every: steps between evaluations; ``None`` for no evaluation at all.
            save_every: steps between checkpoints; ``None`` for the last one only.
            keeps_best: whether an evaluation better than all before it saves a checkpoint.
        """
        left = max(0, max_steps - step)
        checkpoints = _due(step, max_steps, save_every or max_steps)
        if not evaluate_every:
            return cls(left, 0, checkpoints)
        evaluations = _due(step, max_steps, evaluate_every)
        both = _due(step, max_steps, math.lcm(evaluate_every, save_every or max_steps))
        return cls(left, evaluations, checkpoints, evaluations - both if keeps_best else 0)


def _due(step: int, max_steps: int, every: int) -> int:
    """Multiples of ``every`` in ``(step, max_steps]``, and the last step."""
    if step >= max_steps:
        return 0
    return max_steps // every - step // every + (1 if max_steps % every else 0)


def step_seconds(steps: Sequence[float]) -> float | None:
    """Seconds that a step takes: the median, the warm-up left out; ``None`` if none is left."""
    measured = steps[WARM_UP:]
    return statistics.median(measured) if measured else None


def seconds_left(spent: Durations, left: Remaining) -> float | None:
    """Seconds to the end of the run; what was never measured counts nothing.

    Returns:
        ``None`` before there is a step after the warm-up.
    """
    each = step_seconds(spent.steps)
    if each is None:
        return None
    evaluations = left.evaluations * _median(spent.evaluations)
    # Before there is an evaluation, every one to come counts as a new best: early ones mostly are.
    improving = statistics.fmean(spent.improved) if spent.improved else 1.0
    checkpoints = left.checkpoints + improving * left.chances
    return left.steps * each + evaluations + checkpoints * _median(spent.checkpoints)


def _median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) if seconds else 0.0


def sentence(spent: Durations, left: Remaining, now: datetime) -> str | None:
    """What the log says once: how long, until when, and what that leaves out.

    Args:
        spent: what was measured so far.
        left: what is to come.
        now: local time.

    Returns:
        For instance ``about 2 h 10 min left, until 14:05 (checkpoints not measured yet)``;
        ``None`` before there is a step after the warm-up.
    """
    seconds = seconds_left(spent, left)
    if seconds is None:
        return None
    unknown = [
        name
        for name, count, measured in (
            ("evaluations", left.evaluations, spent.evaluations),
            ("checkpoints", left.checkpoints, spent.checkpoints),
        )
        if count and not measured
    ]
    note = f" ({' and '.join(unknown)} not measured yet)" if unknown else ""
    return f"{shown(seconds)} left, until {clock(now, seconds)}{note}"


def shown(seconds: float) -> str:
    """A duration for people, in its two largest units: ``about 2 h 10 min``."""
    if seconds < 1:
        return "less than a second"
    if round(seconds) < 60:
        return f"about {round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"about {hours} h {minutes} min" if minutes else f"about {hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"about {days} d {hours} h" if hours else f"about {days} d"


def clock(now: datetime, seconds: float) -> str:
    """The time ``seconds`` from ``now``: ``14:05``, or with the date on another day."""
    end = now + timedelta(seconds=seconds)
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"


class Forecast:
    """Measures the parts of a run, and says once how long the rest of them will take.

    Args:
        max_steps: of the run.
        evaluate_every: steps between evaluations; ``None`` for none.
        save_every: steps between checkpoints; ``None`` for the last one only.
        keeps_best: whether an evaluation better than all before it saves a checkpoint.
    """

    def __init__(
        self,
        max_steps: int,
        *,
        evaluate_every: int | None,
        save_every: int | None,
        keeps_best: bool,
    ) -> None:
        self._max_steps = max_steps
        self._evaluate_every, self._save_every = evaluate_every, save_every
        self._keeps_best = keeps_best
        self._spent = Durations()

    @contextmanager
    def measure(self, part: Literal["steps", "evaluations", "checkpoints"]) -> Iterator[None]:
        """What is done inside is one of these."""
        begun = time.perf_counter()
        yield
        getattr(self._spent, part).append(time.perf_counter() - begun)

    def judged(self, *, improved: bool) -> None:
        """An evaluation after a step was the best so far, or was not."""
        self._spent.improved.append(improved)

    def said(self, step: int) -> str | None:
        """The sentence, after the step at which enough are measured; else ``None``."""
        left = Remaining.of(
            step,
            self._max_steps,
            evaluate_every=self._evaluate_every,
            save_every=self._save_every,
            keeps_best=self._keeps_best,
        )
        if len(self._spent.steps) != ENOUGH or not left.steps:
            return None
        return sentence(self._spent, left, datetime.now().astimezone())
