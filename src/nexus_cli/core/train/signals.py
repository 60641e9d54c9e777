"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

CAUGHT = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger(__name__)


class StopRequest:
    """While open, the first signal is remembered; a second Ctrl-C interrupts at once.

    Signals reach the main thread only, so elsewhere (a notebook's worker, a test) this does
    nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in CAUGHT}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        log.warning(
            "%s: finishing this step and saving a checkpoint%s",
            signal.Signals(number).name,
            "; Ctrl-C again to stop without one" if number == signal.SIGINT else "",
        )
