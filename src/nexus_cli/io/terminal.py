"""A conversation on the terminal, or through pipes: questions in, answers out as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

WIDE = 100  # columns from which two answers fit beside each other
Styled = tuple[str, bool]  # text, and whether it is an aside


class Terminal:
    """Reads lines and writes text. Asides, such as a model's analysis, are dimmed."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._aside = False

    @property
    def wide(self) -> bool:
        """Whether two answers fit beside each other."""
        return self._console.is_terminal and self._console.width >= WIDE

    def ask(self, prompt: str) -> str | None:
        """The next line, or ``None`` at its end (Ctrl-D)."""
        if sys.stdin.isatty():
            try:
                return input(prompt)
            except EOFError:
                self.say("")
                return None
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    def say(self, text: str, *, aside: bool = False) -> None:
        """Write a line."""
        self._console.print(Text(text, style="dim" if aside else ""))

    def stream(self, pieces: Iterator[Styled]) -> None:
        """Write text as it comes, and end the line, even when interrupted."""
        try:
            for text, aside in pieces:
                self._console.print(Text(text, style="dim" if aside else ""), end="")
                sys.stdout.flush()
        finally:
            self.say("")

    def side_by_side(self, titles: Sequence[str], answers: Sequence[Iterator[Styled]]) -> None:
        """Write several answers in columns, taking turns."""
        texts = [Text() for _ in answers]
        waiting = dict(enumerate(answers))
        with Live(console=self._console, auto_refresh=False) as live:
            while waiting:
                for column, answer in list(waiting.items()):
                    piece = next(answer, None)
                    if piece is None:
                        del waiting[column]
                    else:
                        texts[column].append(piece[0], style="dim" if piece[1] else "")
                live.update(_columns(titles, texts), refresh=True)


def _columns(titles: Sequence[str], texts: Sequence[Text]) -> Table:
    table = Table(*titles, expand=True, box=None, padding=(0, 2), pad_edge=False)
    for column in table.columns:
        column.ratio = 1
    table.add_row(*texts)
    return table
