"""Where a run starts: at the beginning, or from a checkpoint that is a part of the same run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nexus_cli.core.train.best import FILENAME as BEST
from nexus_cli.core.train.checkpoints import (
    Checkpoint,
    find_checkpoints,
    newest_resumable,
    remove_checkpoint,
    sweep,
)
from nexus_cli.core.train.state import TrainingState, read_counters, read_state
from nexus_cli.errors import ConfigError, WorkspaceError
from nexus_cli.io.metrics import FILENAME as METRICS
from nexus_cli.pipeline.training.request import Request

log = logging.getLogger(__name__)

# A step's sequences are one number in the identity, however they are split over ranks and
# micro-batches; the rest are settings that change nothing that is learned.
NOT_IDENTITY: Any = {
    "runtime": True,
    "output": True,
    "batch_size": True,
    "gradient_accumulation_steps": True,
    "freeze_router": True,
    "max_steps": True,
    "student": True,
    "base": True,
    "teacher": {"model", "store"},
    "evaluation": True,
    "data": {"data_dir"},
}


def identity(request: Request, text_digest: str, dtype: torch.dtype) -> dict[str, Any]:
    """What two runs must share for one to go on from the other's checkpoint."""
    return {
        "command": request.command,
        "settings": request.config.model_dump(mode="json", exclude=NOT_IDENTITY),
        "sequences_per_step": request.sequences_per_step,
        "max_steps": request.max_steps,
        "dtype": str(dtype).removeprefix("torch."),
        "inputs": {role: artifact.digest for role, artifact in request.inputs.items()},
        "text": text_digest,
    }


def choose_start(
    directory: Path, resume: str, mine: Mapping[str, Any], *, force: bool
) -> Checkpoint | None:
    """The checkpoint to go on from; ``None`` to start from the student as it is.

    Args:
        directory: the run's folder.
        resume: ``auto``, ``never`` or the path of a checkpoint.
        mine: the :func:`identity` of this run.
        force: with ``auto`` and ``never``, start over and replace what is there; with a path,
            go on from it although settings differ.

    Raises:
        ConfigError: there is no such checkpoint.
        WorkspaceError: the checkpoint is of another run, or others would be lost.
    """
    sweep(directory)
    if resume not in ("auto", "never"):
        chosen = _named(Path(resume).expanduser())
        if not force:
            _require_same(chosen, mine)
        _require_newest(directory, chosen, force=force)
        if chosen.path.parent.resolve() != directory.resolve():
            _require_own(directory, force=force)
        return chosen
    found = newest_resumable(directory)
    if resume == "auto" and found is not None and not force:
        _require_same(found, mine)
        return found
    left = find_checkpoints(directory)
    if left and not force:
        raise WorkspaceError(
            f"{directory} holds checkpoints of another run, the last at step {left[-1].step}",
            hint="use --force to start over and replace them, or another --output-dir",
        )
    for checkpoint in left:
        remove_checkpoint(checkpoint)
    (directory / BEST).unlink(missing_ok=True)
    return None


def load_start(chosen: Checkpoint) -> TrainingState:
    """The state of the chosen checkpoint.

    Raises:
        ArtifactError: it is damaged.
    """
    state = read_state(chosen.state)
    log.info("going on from %s, step %d", chosen.path, state.step)
    return state


def _named(path: Path) -> Checkpoint:
    parent, name = path.resolve().parent, path.resolve().name
    for checkpoint in find_checkpoints(parent):
        if checkpoint.path.name == name:
            if checkpoint.resumable:
                return checkpoint
            raise ConfigError(
                f"{path} is a model without its training state: only the newest checkpoints "
                "keep it",
                hint="resume from a newer one, or train on from it as --student-model",
            )
    raise ConfigError(f"there is no checkpoint at {path}", hint="give the path of a checkpoint-N")


def _require_same(checkpoint: Checkpoint, mine: Mapping[str, Any]) -> None:
    theirs = read_counters(checkpoint.state)["identity"]
    if changed := differing(theirs, mine):
        raise WorkspaceError(
            f"{checkpoint.path} is of a run with other settings: {', '.join(changed)}",
            hint="use --force to start over, --resume with its path and --force to go on from "
            "it all the same, or another --output-dir",
        )


def _require_own(directory: Path, *, force: bool) -> None:
    """A run that goes on from elsewhere shares its folder with nobody."""
    left = find_checkpoints(directory)
    if left and not force:
        raise WorkspaceError(
            f"{directory} holds checkpoints of another run, the last at step {left[-1].step}",
            hint="use --force to replace them, or another --output-dir",
        )
    for checkpoint in left:
        remove_checkpoint(checkpoint)
    for name in (BEST, METRICS):
        (directory / name).unlink(missing_ok=True)


def _require_newest(directory: Path, chosen: Checkpoint, *, force: bool) -> None:
    """Later checkpoints in the run's folder would mix with those of the resumed run."""
    later = [c for c in find_checkpoints(directory) if c.step > chosen.step]
    if later and not force:
        raise WorkspaceError(
            f"{directory} holds later checkpoints than {chosen.path}, up to step {later[-1].step}",
            hint="use --force to replace them, or another --output-dir",
        )
    for checkpoint in later:
        remove_checkpoint(checkpoint)


def differing(theirs: Mapping[str, Any], mine: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what differs, with both values where they are short."""
    names: list[str] = []
    for key in sorted(theirs.keys() | mine.keys()):
        old, new = theirs.get(key), mine.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += differing(old, new, f"{prefix}{key}.")
        elif old != new:
            short = len(str(old)) + len(str(new)) < 40
            names.append(f"{prefix}{key} ({old}, now {new})" if short else prefix + key)
    return names
