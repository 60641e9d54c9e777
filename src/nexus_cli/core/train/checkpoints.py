"""Folders ``checkpoint-N``: models or adapters, and the training state of the newest."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nexus_cli.core.train.best import read_best
from nexus_cli.core.train.state import COUNTERS, TrainingState, write_state
from nexus_cli.io.atomic import atomic_directory
from nexus_cli.io.model_dir import is_adapter, is_model

NAME = re.compile(r"checkpoint-(\d+)")
STATE = "training_state"
WITH_STATE = 2  # the newest that keep their optimizer state: one to resume from, one to spare

WriteModel = Callable[[Path, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint; a folder that is being written has another name."""

    step: int
    path: Path

    @property
    def state(self) -> Path:
        """Its training state."""
        return self.path / STATE

    @property
    def resumable(self) -> bool:
        """Whether it still has its training state."""
        return (self.state / COUNTERS).is_file()


def find_checkpoints(directory: Path) -> list[Checkpoint]:
    """The whole checkpoints in ``directory``, oldest first."""
    if not directory.is_dir():
        return []
    found = (
        Checkpoint(int(match[1]), path)
        for path in directory.iterdir()
        if (match := NAME.fullmatch(path.name)) and (is_model(path) or is_adapter(path))
    )
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_resumable(directory: Path) -> Checkpoint | None:
    """The checkpoint that a resumed run goes on from."""
    resumable = [c for c in find_checkpoints(directory) if c.resumable]
    return resumable[-1] if resumable else None


def save_checkpoint(
    directory: Path, state: TrainingState, write_model: WriteModel, *, keep_last: int
) -> Checkpoint:
    """Write ``checkpoint-<step>`` whole or not at all, then drop what is no longer kept.

    Args:
        directory: the run's folder.
        state: what to save; its masters are what the model is written from.
        write_model: writes a complete model folder, or an adapter's, with these trained tensors.
        keep_last: how many checkpoints stay.
    """
    saved = Checkpoint(state.step, directory / f"checkpoint-{state.step}")
    with atomic_directory(saved.path) as temporary:
        write_model(temporary, state.masters)
        write_state(temporary / STATE, state)
    _prune(directory, keep_last)
    return saved


def remove_checkpoint(checkpoint: Checkpoint) -> None:
    """Delete it, under another name first, so that no half of it is ever taken for whole."""
    _remove(checkpoint.path)


def sweep(directory: Path) -> None:
    """Delete what a kill left half written or half deleted; whole checkpoints stay."""
    for path in directory.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _prune(directory: Path, keep_last: int) -> None:
    """Keep the newest, and the best on held-out text beside them."""
    checkpoints, best = find_checkpoints(directory), read_best(directory)
    for checkpoint in checkpoints[:-keep_last]:
        if best is None or checkpoint.step != best.step:
            remove_checkpoint(checkpoint)
    for checkpoint in checkpoints[:-WITH_STATE]:
        if checkpoint.state.exists():
            _remove(checkpoint.state)


def _remove(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.removed.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
