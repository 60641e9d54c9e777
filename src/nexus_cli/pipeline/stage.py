"""What every stage does around its own work: lock, skip if current, commit at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from nexus_cli.config.base import ConfigModel
from nexus_cli.errors import NexusError, WorkspaceError
from nexus_cli.io import lock, manifest
from nexus_cli.io.hashing import sha256_json
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.inputs import Artifact

log = logging.getLogger(__name__)

PLACES = {"runtime", "output", "base"}  # say how and where, never what: they leave no stage stale


class Ranks(Protocol):
    """What a stage asks of the other processes of a distributed run."""

    @property
    def is_main(self) -> bool:
        """Whether this rank locks, decides and commits."""
        ...

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...


@dataclass
class StageOutput:
    """Where a running stage writes, and what it has written."""

    directory: Path
    main: Path
    fingerprint: str
    files: dict[str, manifest.Output] = field(default_factory=dict)

    def add(self, path: Path, format: str) -> None:
        """Record a finished file or folder inside :attr:`directory`."""
        self.files[path.relative_to(self.directory).as_posix()] = manifest.describe(path, format)


@dataclass(frozen=True)
class _Place:
    """Paths of one stage: in its workspace folder, or where ``--output`` says."""

    directory: Path
    main: Path
    manifest: Path
    lock: Path


@contextmanager
def stage(
    name: str,
    config: ConfigModel,
    workspace: Workspace,
    *,
    main: str,
    inputs: Mapping[str, Artifact],
    output: Path | None = None,
    world: Ranks | None = None,
    force: bool = False,
    whole_directory: bool = False,
    check: Callable[[], None] | None = None,
) -> Iterator[StageOutput | None]:
    """Open the stage ``name``, or yield ``None`` if its outputs are already current.

    The manifest is written only if the block succeeds, so a crash leaves no stage that
    looks finished. With several ranks only the main one locks, decides and commits.

    Args:
        name: the stage's folder in the workspace.
        config: its settings; all but :data:`PLACES` make its fingerprint.
        workspace: used where ``output`` is not given.
        main: file or folder name of the main artifact in the workspace folder.
        inputs: what the stage reads, by role.
        output: the user's path for the main artifact; its manifest is put beside it.
        world: the ranks of a distributed run.
        force: replace a finished stage made with other settings, or run it again.
        whole_directory: the main artifact is the folder that everything is written to.
        check: refuses, by an error, a run that cannot succeed, before anything that an earlier one
            left is given up; called by the main rank where there is something to do.

    Raises:
        WorkspaceError: another process holds the stage, or it was made otherwise. Every rank
            raises what the main one does.
        ArtifactError: its manifest is damaged.
        ResourceError: its folder cannot be written.
    """
    place = _place(name, workspace, main, output, whole_directory)
    is_main = world is None or world.is_main
    settings = config.model_dump(mode="json", exclude=PLACES)
    digests = {role: artifact.digest for role, artifact in inputs.items()}
    fingerprint = sha256_json({"stage": name, "inputs": digests, "config": settings})
    started = manifest.now()
    with ExitStack() as held:
        current = False
        refused: NexusError | None = None
        if is_main:
            try:
                held.enter_context(lock.exclusive(place.lock))
                current = _is_current(name, place, fingerprint, settings, digests, force=force)
                if check is not None and not current:
                    check()
            except NexusError as error:
                refused = error  # told to all: ranks that wait would die of a lost connection
        if world is not None:
            current, refused = world.broadcast_object((current, refused))
        if refused is not None:
            raise refused
        if current:
            log.info("%s is up to date: %s", name, place.main)
            yield None
            return
        if is_main:
            place.manifest.unlink(missing_ok=True)
        written = StageOutput(place.directory, place.main, fingerprint)
        yield written
        if world is not None:
            world.barrier()
        if is_main:
            record = _record(name, written, settings, inputs, started)
            manifest.commit(place.manifest, record)
            log.info("%s finished: %s", name, written.main)


def _record(
    name: str,
    written: StageOutput,
    settings: dict[str, Any],
    inputs: Mapping[str, Artifact],
    started: datetime,
) -> manifest.Manifest:
    """What a finished stage leaves behind."""
    return manifest.Manifest(
        stage=name,
        fingerprint=written.fingerprint,
        config=settings,
        inputs={role: artifact.digest for role, artifact in inputs.items()},
        sources=dict(a.source for a in inputs.values() if a.source is not None),
        outputs=written.files,
        main=written.main.relative_to(written.directory).as_posix(),
        environment=manifest.environment(),
        command=manifest.command_line(),
        started=started,
        finished=manifest.now(),
    )


def _place(name: str, workspace: Workspace, main: str, output: Path | None, whole: bool) -> _Place:
    if output is None:
        folder = workspace.stage_dir(name)
        path = folder if whole else folder / main
        return _Place(folder, path, workspace.manifest_path(name), folder / ".lock")
    path = output.expanduser()
    return _Place(
        directory=path if whole else path.parent,
        main=path,
        manifest=path.with_name(f"{path.name}.manifest.json"),
        lock=path.with_name(f".{path.name}.lock"),
    )


def _is_current(
    name: str,
    place: _Place,
    fingerprint: str,
    settings: Mapping[str, Any],
    digests: Mapping[str, str],
    *,
    force: bool,
) -> bool:
    if force:
        return False  # without a look at the manifest, which may be what is damaged
    previous = manifest.read(place.manifest)
    if previous is None or not place.main.exists():
        return False  # nothing is there to be kept, as after the user removed it
    if previous.fingerprint == fingerprint:
        return manifest.is_whole(place.directory, previous)
    changed = _differing(previous.config, settings) + [
        f"input {role}" for role in digests if previous.inputs.get(role) != digests[role]
    ]
    raise WorkspaceError(
        f"{place.main} was made with other settings or inputs ({', '.join(changed) or name})",
        hint="use --force to replace it, or another --workspace or output path",
    )


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ."""
    names: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            names += _differing(before, after, f"{prefix}{key}.")
        elif before != after:
            names.append(prefix + key)
    return names
