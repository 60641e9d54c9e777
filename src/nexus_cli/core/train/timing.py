"""Where a step's time goes, and how many tokens a second that makes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


class PhaseClock:
    """Seconds of each phase of one step.

    A GPU works after the call that launched it has returned, so there a phase ends when its work
    is done. Waiting costs what it hides, and is done only for the steps that ask for it; the
    others have no figures.

    Args:
        device: that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._runs = False
        self._seconds: dict[str, float] = {}
        self._started = 0.0

    def start(self, *, waits: bool) -> None:
        """Begin a step.

        Args:
            waits: whether a GPU is waited for; of no matter on a CPU.
        """
        self._runs = waits or self._device.type != "cuda"
        self._seconds = {}
        self._started = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what is done inside to phase ``name``."""
        begun = self._now()
        yield
        if self._runs:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - begun

    def read(self) -> dict[str, float]:
        """Seconds of the step so far: every phase, and ``other``; empty where none was timed."""
        if not self._runs:
            return {}
        other = self._now() - self._started - sum(self._seconds.values())
        return {**self._seconds, "other": max(other, 0.0)}

    def _now(self) -> float:
        if self._runs and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass
class Stopwatch:
    """Tokens a second since the last reading."""

    started: float = field(default_factory=time.perf_counter)

    def rate(self, tokens: int) -> float:
        """Tokens a second since the last call, and start again."""
        now = time.perf_counter()
        elapsed, self.started = now - self.started, now
        return tokens / max(elapsed, 1e-9)
