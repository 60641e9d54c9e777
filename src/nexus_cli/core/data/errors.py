"""What can be wrong with text, as errors that the pipeline gives an exit code."""

from __future__ import annotations

from pathlib import Path

MEND = "Mend the file, or give other text with --data PATH; docs/data.md lists the forms."


class DataError(ValueError):
    """Text that cannot be used. ``hint`` is the next thing to try, as one sentence."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UnknownSourceError(DataError):
    """A name that is no known source, no path and no hub id."""


class MissingTextError(DataError):
    """A known source whose text is not on this machine, cannot be fetched, or is too short."""


class BadFileError(DataError):
    """A file of text that is corrupt, empty, or of a layout that is not known."""


class BadRowError(ValueError):
    """A row that is of no known layout; the reader says in which file and line."""


class UnusableRowError(ValueError):
    """A row of a known layout with nothing to learn in it; the message is the reason to count."""


def bad_file(path: Path, line: int | None, what: str, hint: str | None = None) -> BadFileError:
    """Name the file, the line where there is one (counted from 1), and what is wrong with it."""
    where = str(path) if line is None else f"{path}, line {line}"
    return BadFileError(f"{where}: {what}", hint or MEND)
