"""A thread that writes while its caller goes on computing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from types import TracebackType
from typing import Self


class WriteBehind:
    """Runs jobs one after another, in order, behind its caller's back.

    A job's error is raised at the next call, or at the end of the ``with`` block; the jobs after
    it are dropped.

    Attributes:
        waited: seconds that the caller waited for jobs.
    """

    def __init__(self, pending: int = 4) -> None:
        """Let at most ``pending`` jobs wait; the caller of one more waits itself."""
        self.waited = 0.0
        self._most = pending
        self._failed = False
        self._pool = ThreadPoolExecutor(1, "write-behind")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._wait_until(0)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, job: Callable[[], None]) -> None:
        """Queue ``job``."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._wait_until(self._most - 1)
        self._pending.append(self._pool.submit(self._do, job))

    def _do(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise

    def _wait_until(self, left: int) -> None:
        started = perf_counter()
        while len(self._pending) > left:
            self._pending.popleft().result()
        self.waited += perf_counter() - started
