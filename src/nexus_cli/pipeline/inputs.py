"""Find what a stage reads: an explicit path, or the output of the stage before."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from nexus_cli.errors import WorkspaceError
from nexus_cli.io import console, manifest, model_dir
from nexus_cli.io.base_identity import replaced_base
from nexus_cli.io.workspace import Workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """Something that a stage reads, and the identity of its content.

    Attributes:
        path: the file or folder.
        digest: of its content.
        source: the stage of the workspace that wrote it and the digest of what that stage had
            written then; ``None`` for a path that the user gave.
    """

    path: Path
    digest: str
    source: tuple[str, str] | None = None


def stage_input(workspace: Workspace, stage: str, explicit: Path | None) -> Artifact:
    """The main output of ``stage``; an explicit path beats the workspace.

    Raises:
        WorkspaceError: the path is missing, or the stage has not finished or is stale.
        ArtifactError: it is a model whose base has moved or changed.
    """
    if explicit is not None:
        return _from_path(explicit.expanduser(), stage)
    known = workspace.find(stage)
    if known is not None:  # links that lead nowhere say so, before files count as lost
        model_dir.require_links(workspace.stage_dir(stage) / known.main)
    found = workspace.require(stage)
    digest = workspace.digest(stage, found)
    return Artifact(workspace.stage_dir(stage) / found.main, digest, (stage, digest))


def model_input(name: str | Path) -> Artifact:
    """A model folder by path, or the embedded model.

    Raises:
        ConfigError: there is no such model folder.
        ArtifactError: it is damaged, or its base has moved or changed since it was converted.
    """
    path = model_dir.resolve_model(name)
    model_dir.read_shape(path)
    found = Artifact(path, model_dir.fingerprint(path))
    if (base := replaced_base(path)) is not None and console.is_main_rank():
        log.warning("the base %s was replaced since %s was converted, which is whole", base, path)
    return found


def _from_path(path: Path, stage: str) -> Artifact:
    if not path.exists():
        raise WorkspaceError(f"{path} does not exist", hint=f"nexus {stage} writes it")
    if model_dir.is_model(path):
        return model_input(path)
    return Artifact(path, manifest.describe(path, "input").sha256)
