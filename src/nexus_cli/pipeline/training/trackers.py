"""``--report-to``: the metrics of a run, also to the trackers that accelerate knows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from nexus_cli.core.train.loop import Recorder
from nexus_cli.errors import ConfigError

log = logging.getLogger(__name__)

PROJECT = "nexus"
TENSORBOARD = "tensorboard"  # the folder, inside the run's


class Reporter:
    """A recorder that also tells trackers every number of a record.

    Args:
        recorder: gets the records as they are.
        trackers: get numbers under flat names, such as ``eval/domain/kd``.
    """

    def __init__(self, recorder: Recorder, trackers: Sequence[GeneralTracker]) -> None:
        self._recorder = recorder
        self._trackers = trackers

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, and report what numbers it has."""
        self._recorder.write(record)
        numbers = flat_numbers(record)
        step = int(numbers.pop("step"))
        if numbers and "event" not in record:
            for tracker in self._trackers:
                tracker.log(numbers, step=step)


@contextmanager
def reporting(
    recorder: Recorder,
    names: Sequence[str],
    directory: Path,
    settings: Mapping[str, Any],
    step: int,
) -> Iterator[Recorder]:
    """A recorder that reports to the trackers ``names``, which are closed at the end.

    Args:
        recorder: of the run.
        names: ``tensorboard`` or ``wandb``, both installed.
        directory: the run's folder.
        settings: of the run, shown beside its curves.
        step: that the run starts from; TensorBoard hides what an earlier process wrote after it.
    """
    trackers = [_open(name, directory, step) for name in names]
    for tracker in trackers:
        if hasattr(tracker, "start"):  # older versions of accelerate open it when it is made
            tracker.start()
        tracker.store_init_configuration(flat_settings(settings))
    try:
        yield Reporter(recorder, trackers) if trackers else recorder
    finally:
        for tracker in trackers:
            tracker.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not there, before anything is loaded.

    Raises:
        ConfigError: with the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"--report-to {name}: the package {name} is not installed",
                hint=f"pip install {name}, or leave the flag out: metrics.jsonl has every number",
            )


def flat_numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record under paths of its keys; lists, texts and truths are left out."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as one level of keys, with values that every tracker stores."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{prefix}{key}.")
        else:
            simple = isinstance(value, bool | int | float | str)
            found[prefix + key] = value if simple else str(value)
    return found


def _open(name: str, directory: Path, step: int) -> GeneralTracker:
    log.info("reporting to %s", name)
    if name == TENSORBOARD:
        tracker: Any = TensorBoardTracker(
            directory.name, logging_dir=directory / TENSORBOARD, purge_step=step + 1
        )
    else:
        tracker = WandBTracker(PROJECT, name=directory.name, dir=str(directory))
    opened: GeneralTracker = tracker
    return opened
