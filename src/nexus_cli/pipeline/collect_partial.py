"""Statistics of a run that is not finished, so that a killed ``nexus collect`` continues."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_cli.core.distributed import World
from nexus_cli.core.router.moments import RouterMoments
from nexus_cli.errors import ArtifactError
from nexus_cli.io import router_probs
from nexus_cli.pipeline.disk import room_for
from nexus_cli.pipeline.router_statistics import load_moments, save_moments

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Statistics and the batches that they come from."""

    moments: RouterMoments
    batches: frozenset[int]

    def __add__(self, other: Progress) -> Progress:
        return Progress(self.moments + other.moments, self.batches | other.batches)


class PartialStatistics:
    """A folder with one file a rank, replaced whole each time.

    The run may continue on another number of ranks: files of ranks that are gone are shared out,
    and whoever takes one over saves its content with its own. A file whose batches another file
    holds too has been taken over, and is not counted again.
    """

    def __init__(self, folder: Path, plan_digest: str, world: World) -> None:
        """Of the run with this plan; files of other plans are left alone until the end."""
        self._folder = folder
        self._digest = plan_digest
        self._world = world

    def load(self, empty: RouterMoments) -> tuple[Progress, frozenset[int]]:
        """This rank's share of what was done before, and all batches that were.

        Args:
            empty: statistics of no token.
        """
        shared = self._world.broadcast_object(self._find() if self._world.is_main else None)
        mine = Progress(empty, frozenset())
        for place, (path, _) in enumerate(shared):
            if self._owner(path, place) == self._world.rank:
                batches = frozenset(dict(shared)[path])
                mine = mine + Progress(load_moments(path)[0], batches)
        self._world.barrier()  # nobody replaces a file before everybody has read
        done = frozenset(batch for _, batches in shared for batch in batches)
        if done:
            log.info("continuing: %d batches were counted before", len(done))
        return mine, done

    def save(self, progress: Progress) -> None:
        """Replace this rank's file."""
        name = f"rank-{self._world.rank}-of-{self._world.size}.npz"
        metadata = {"plan": self._digest, "batches": sorted(progress.batches)}
        with room_for(self._folder):
            save_moments(self._folder / name, progress.moments, metadata)

    def discard(self) -> None:
        """Remove the folder; the main rank calls this when the statistics are whole."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _find(self) -> list[tuple[Path, Sequence[int]]]:
        """Files of this plan that count different batches, the fullest first."""
        found = []
        for path in sorted(self._folder.glob("rank-*-of-*.npz")):
            try:
                metadata = router_probs.read(path).metadata
            except ArtifactError as error:
                log.warning("%s; its batches will run again", error)
                continue
            if metadata.get("plan") == self._digest:
                found.append((path, metadata["batches"]))
            else:
                log.info("%s is of other text or settings, and is not used", path)
        found.sort(key=lambda entry: (-len(entry[1]), entry[0]))
        kept: list[tuple[Path, Sequence[int]]] = []
        counted: set[int] = set()
        for path, batches in found:
            if counted.isdisjoint(batches):
                kept.append((path, batches))
                counted.update(batches)
        return kept

    def _owner(self, path: Path, place: int) -> int:
        """The rank that wrote the file if it is still there, else one in turn."""
        _, rank, _, size = path.stem.split("-")
        return int(rank) if int(size) == self._world.size else place % self._world.size
