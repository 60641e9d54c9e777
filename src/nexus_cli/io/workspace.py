"""Where things are in a run's directory. Paths only: no stage logic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nexus_cli.errors import WorkspaceError
from nexus_cli.io import manifest, model_dir
from nexus_cli.io.manifest import Manifest

DEFAULT_ROOT = Path("runs/default")


@dataclass(frozen=True)
class Workspace:
    """A run's directory, one folder for each stage."""

    root: Path = DEFAULT_ROOT

    def stage_dir(self, stage: str) -> Path:
        """The folder that ``stage`` owns. It may not exist yet."""
        return self.root / stage

    def manifest_path(self, stage: str) -> Path:
        """The record that a finished ``stage`` leaves."""
        return self.stage_dir(stage) / manifest.FILENAME

    def find(self, stage: str) -> Manifest | None:
        """The manifest of ``stage``, or ``None`` if it has not finished."""
        return manifest.read(self.manifest_path(stage))

    def require(self, stage: str) -> Manifest:
        """The manifest of a finished stage whose outputs are all there.

        Raises:
            WorkspaceError: the stage has not finished, lost an output, or is stale: something
                that it was made from, however far back, was made again since.
        """
        found = self.find(stage)
        hint = f"run: nexus {stage} --workspace {self.root}"
        if found is None:
            raise WorkspaceError(f"{self.root} has no finished '{stage}' stage", hint=hint)
        if not manifest.is_whole(self.stage_dir(stage), found):
            raise WorkspaceError(f"{self.stage_dir(stage)} lost some of its files", hint=hint)
        self._require_current(stage, found)
        return found

    def digest(self, stage: str, found: Manifest) -> str:
        """Identity of what ``stage`` wrote, by its manifest ``found``.

        A model is looked at again: its shards are linked to files that are not ours, and notes
        beside them do not make it another model.
        """
        path = self.stage_dir(stage) / found.main
        return model_dir.fingerprint(path) if model_dir.is_model(path) else found.digest

    def _require_current(self, stage: str, found: Manifest) -> None:
        """Refuse ``stage`` if one that it was made from has other content by now.

        A source that was deleted, or did not finish again, says nothing about what was made
        from it.
        """
        for source, digest in found.sources.items():
            now = self.find(source)
            if now is None or not manifest.is_whole(self.stage_dir(source), now):
                continue
            self._require_current(source, now)
            if self.digest(source, now) != digest:
                raise WorkspaceError(
                    f"{self.stage_dir(stage)} is stale: '{source}' was made again after it",
                    hint=f"run: nexus {stage} --workspace {self.root} --force",
                )
