"""``--report-to``: the metrics of a run, also to the trackers that accelerate knows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from nexus_cli.core.distributed import World
from nexus_cli.core.train.loop import Recorder
from nexus_cli.errors import ConfigError

log = logging.getLogger(__name__)

PROJECT = "nexus"
TENSORBOARD = "tensorboard"  # also the folder, inside the run's
WANDB = "wandb"
ELSEWHERE = "metrics.jsonl has every number"
HINTS = {
    TENSORBOARD: f"look at its folder, or leave the flag out: {ELSEWHERE}",
    WANDB: "run: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline to stay on this "
    f"machine; or leave the flag out: {ELSEWHERE}",
}


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
def open_trackers(
    names: Sequence[str], directory: Path, settings: Mapping[str, Any], step: int, world: World
) -> Iterator[list[GeneralTracker]]:
    """The trackers ``names``, started on the main rank and closed at the end; others get none.

    Args:
        names: ``tensorboard`` or ``wandb``, both installed.
        directory: the run's folder.
        settings: of the run, shown beside its curves.
        step: that the run starts from; TensorBoard hides what an earlier process wrote after it.
        world: every rank learns of a tracker that does not start.

    Raises:
        ConfigError: a tracker does not start.
    """
    opened: list[GeneralTracker] = []
    shown = flat_settings(settings)

    def start() -> None:
        for name in names:
            with _said_in_one_line(name):
                tracker = _open(name, directory, step)
                if hasattr(tracker, "start"):  # older versions of accelerate start it when made
                    tracker.start()
                opened.append(tracker)
                tracker.store_init_configuration(shown)

    try:
        world.from_main(start)
        yield opened
    finally:
        for tracker in opened:
            tracker.finish()


def require_trackers(names: Sequence[str], world: World) -> None:
    """Refuse a tracker that is not installed or has no login, before anything is loaded.

    Raises:
        ConfigError: with the command that installs it, or logs in.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"--report-to {name}: the package {name} is not installed",
                hint=f"pip install {name}, or leave the flag out: {ELSEWHERE}",
            )
    if WANDB in names:
        world.from_main(_log_in)


def _log_in() -> None:
    """As wandb does it: by the environment or netrc, else by asking; offline it asks nothing."""
    with _said_in_one_line(WANDB):
        import_module(WANDB).login()


@contextmanager
def _said_in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a client of somebody else's: there is no telling what it raises
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"--report-to {name}: {said}", hint=HINTS[name]) from error


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
