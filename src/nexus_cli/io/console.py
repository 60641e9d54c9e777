"""What a user sees: log lines and progress on stderr, results on stdout, from rank 0 alone."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

ItemT = TypeVar("ItemT")
log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


def is_main_rank() -> bool:
    """Whether this process speaks for all ranks."""
    return os.environ.get("RANK", "0") == "0"


class _Lines(logging.Handler):
    """One record, one line: what a file or a pipe can be searched in."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def configure(level: int = logging.INFO) -> None:
    """Send the package's log to stderr; ranks other than 0 say warnings only."""
    logger = logging.getLogger("nexus_cli")
    logger.setLevel(level if is_main_rank() else logging.WARNING)
    logger.propagate = False
    for handler in list(logger.handlers):
        if isinstance(handler, RichHandler | _Lines):
            logger.removeHandler(handler)
    logger.addHandler(_handler())


def _handler() -> logging.Handler:
    if sys.stderr.isatty():
        return RichHandler(
            console=_terminal(), show_path=False, show_level=False, log_time_format="%H:%M:%S"
        )
    plain = _Lines()
    plain.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    return plain


@cache
def _terminal() -> Console:
    """The one console on stderr: what it draws in place makes room for what it logs."""
    return Console(stderr=True, soft_wrap=True)


def log_to_file(path: Path) -> logging.Handler:
    """Copy the package's log into ``path`` as plain text; close the handler to stop."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("nexus_cli").addHandler(handler)
    return handler


@contextmanager
def live_line() -> Iterator[Callable[[str], None]]:
    """A function that puts a text in place of the last one, below the log; on a terminal alone."""
    if not is_main_rank() or not sys.stderr.isatty():
        yield lambda _: None
        return
    with Live(console=_terminal(), transient=True, refresh_per_second=8) as live:
        yield lambda text: live.update(Text(text, no_wrap=True, overflow="ellipsis", style="dim"))


def result(text: str) -> None:
    """Print a result on stdout, at rank 0."""
    if is_main_rank():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def result_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a small table on stdout, at rank 0."""
    if not is_main_rank():
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else 120
    Console(file=sys.stdout, width=width).print(table)


def progress(
    items: Iterable[ItemT], description: str, *, total: int | None = None
) -> Iterator[ItemT]:
    """Yield ``items`` behind a bar on a terminal, or with a log line now and then."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    if not is_main_rank():
        yield from items
    elif sys.stderr.isatty():
        yield from _bar(items, description, total)
    else:
        yield from _lines(items, description, total)


def _bar(items: Iterable[ItemT], description: str, total: int | None) -> Iterator[ItemT]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_terminal(), transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def _lines(items: Iterable[ItemT], description: str, total: int | None) -> Iterator[ItemT]:
    spoken = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - spoken >= SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            log.info("%s: %d of %s", description, number, total if total is not None else "?")
