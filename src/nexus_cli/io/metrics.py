"""``metrics.jsonl`` (``nexus.metrics/1``): one JSON object a line, ``step`` first.

A value that is not a finite number is written as ``null``: the file stays valid JSON for
every reader, and a plot shows the gap. A missing key means that nothing was measured.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nexus_cli.errors import ArtifactError
from nexus_cli.io.atomic import write_atomic

FORMAT = "nexus.metrics/1"
FILENAME = "metrics.jsonl"
STDIN = "-"

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends records, each on the disk's side of the process as soon as it is written.

    Args:
        path: The file; its folder must exist.
        resume_step: ``None`` starts an empty file. A step keeps the records up to and
            including it: those after the checkpoint were of a run that never happened,
            and a last line torn by a kill goes with them.

    Raises:
        ArtifactError: If a resumed file is damaged anywhere but in its last line.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        kept: list[dict[str, Any]] = []
        if resume_step is not None and path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= resume_step]
        write_atomic(path, "".join(map(_to_line, kept)).encode())
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and flush it.

        Raises:
            ValueError: If the record has no whole ``step``.
        """
        self._stream.write(_to_line(record))
        self._stream.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(source: Path | str) -> list[dict[str, Any]]:
    """Every record of a run, in the file's order.

    A last line without its newline that does not parse is what a kill, or a run that is
    still writing, leaves behind: it is left out with a warning.

    Args:
        source: A ``metrics.jsonl``, the folder of a run, its ``training.log`` (the
            ``metrics.jsonl`` beside it is read), or ``-`` for records on stdin.

    Raises:
        ArtifactError: If there are no metrics, or a line is not a record.
    """
    if str(source) == STDIN:
        return _parse(sys.stdin.read(), "<stdin>")
    path = find_metrics(Path(source))
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{path} is not a metrics file: {error.reason} at byte {error.start}",
            hint=f"give the run's folder or its {FILENAME}",
        ) from error
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror}", hint="check the path and its permissions"
        ) from error


def find_metrics(path: Path) -> Path:
    """The metrics file that ``path`` means.

    Where ``path`` has none, a single run in a folder just below it is taken, and said.

    Raises:
        ArtifactError: If there is none, or more than one below.
    """
    if path.is_file() and path.suffix != ".log":
        return path
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.suffix == ".log") and (folder / FILENAME).is_file():
        return folder / FILENAME
    below = sorted(folder.glob(f"*/{FILENAME}"))
    if len(below) > 1:
        names = ", ".join(str(found.parent) for found in below)
        raise ArtifactError(
            f"{path} has no {FILENAME}, and there are several runs below it: {names}",
            hint=f"name one: --log-file {below[0].parent}",
        )
    if not below:
        raise ArtifactError(
            f"no training metrics at {path}: there is no {FILENAME} in {folder}",
            hint="give --log-file the folder of a training run; `nexus train` writes one",
        )
    log.warning("%s has no %s; reading the only run below it, %s", path, FILENAME, below[0])
    return below[0]


def _parse(text: str, name: str) -> list[dict[str, Any]]:
    lines = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        problem = ""
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except ValueError as error:
            if number == len(lines):
                log.warning("%s: left out the unfinished last line (%d)", name, number)
                break
            problem = str(error)
        else:
            if isinstance(record, dict) and _is_step(record.get("step")):
                records.append(record)
                continue
            problem = 'not an object with a whole "step"'
        raise ArtifactError(
            f"{name}, line {number}: {problem}",
            hint="the file was edited or is not a metrics file; remove that line",
        )
    return records


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _to_line(record: Mapping[str, Any]) -> str:
    if not _is_step(record.get("step")):
        raise ValueError(f'a metrics record needs a whole "step", not {record.get("step")!r}')
    ordered = {"step": record["step"], **record}
    return json.dumps(_finite(ordered), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """``value`` with every number that JSON cannot hold as ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
