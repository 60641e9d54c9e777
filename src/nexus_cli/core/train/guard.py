"""Stops a run before a broken number reaches its weights."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 50  # steps whose median is the usual loss
FEWEST = 10  # steps before anything is called usual
TIMES = 3.0  # a loss that explodes is also this many times the usual one
IN_A_ROW = 3  # one batch of odd text is no explosion


class LossError(ValueError):
    """The loss is beyond use; this step's gradient was not applied."""

    kept = "nothing was learned from it and no file was overwritten"


class NotFiniteError(LossError):
    """A loss or a gradient is NaN or infinite."""


class ExplodingLossError(LossError):
    """The loss left what was usual, step after step."""

    kept = "no checkpoint was written since it began"


class LossGuard:
    """Knows a run's usual loss, the median of its last steps.

    Args:
        limit: nats above the usual loss that a step may have; ``None`` for any.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._above = 0

    @property
    def usual(self) -> float | None:
        """The median of the last steps' losses; ``None`` before there are enough."""
        return statistics.median(self._recent) if len(self._recent) >= FEWEST else None

    @property
    def alarmed(self) -> bool:
        """Whether the last step's loss was far above the usual one."""
        return self._above > 0

    def remember(self, losses: Iterable[float]) -> None:
        """Take the losses of steps before a resume, in order."""
        for loss in losses:
            try:
                self.check(loss, 0.0)
            except LossError:
                self._above = 0

    def check(self, loss: float, norm: float) -> str | None:
        """Judge a step.

        Args:
            loss: of the step, over all ranks.
            norm: of its gradient.

        Returns:
            A warning where the loss is far above the usual one, for the first steps of that kind.

        Raises:
            NotFiniteError: loss or norm is not a finite number.
            ExplodingLossError: the third step in a row is far above the usual loss.
        """
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss}")
        if not math.isfinite(norm):
            raise NotFiniteError(f"the gradient's norm is {norm}")
        usual = self.usual
        if self._limit is None or usual is None or not self._is_far(loss, usual, self._limit):
            self._above = 0
            self._recent.append(loss)
            return None
        self._above += 1
        words = f"the loss is {loss:.4g}, and was {usual:.4g} before"
        if self._above == IN_A_ROW:
            raise ExplodingLossError(f"{words}, for {IN_A_ROW} steps in a row")
        return words

    @staticmethod
    def _is_far(loss: float, usual: float, limit: float) -> bool:
        return loss > usual + limit and loss > TIMES * usual
