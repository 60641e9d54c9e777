"""The best checkpoint of a run, by the run's own objective on held-out text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nexus_cli.core.distributed import World
from nexus_cli.core.train.step import SourceWeights
from nexus_cli.errors import ArtifactError
from nexus_cli.io.atomic import write_atomic

FILENAME = "best.json"


@dataclass(frozen=True)
class Best:
    """The evaluation with the lowest objective so far.

    Attributes:
        step: after which it was made; 0 is the student as it started, which has no checkpoint.
        objective: in nats a token.
    """

    step: int
    objective: float

    def evaluations_until(self, step: int, every: int) -> int:
        """Evaluations after this one up to ``step``, one each ``every`` steps and one at the end.

        Counted from the step numbers, so that a resumed run counts as an unbroken one.
        """
        return -(-(step - self.step) // every)


def held_out_objective(
    results: Mapping[str, Mapping[str, float]], weights: Mapping[str, SourceWeights]
) -> float:
    """``w_ce CE + w_kd KL``, the mean over the held-out sources: what training minimises.

    Domain text counts by how well it is learned and replay text by how little the model has moved
    on it, so the lowest is the best trade of the two that the run's own weights ask for.

    Args:
        results: of :func:`~nexus_cli.core.train.evaluation.evaluate`, by source.
        weights: of each of those sources.
    """
    values = [
        weights[name].ce * result["loss"] + weights[name].kd * result.get("kd", 0.0)
        for name, result in results.items()
    ]
    return sum(values) / len(values)


def read_best(directory: Path) -> Best | None:
    """The best of the run in ``directory``, if it was written down.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = directory / FILENAME
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return Best(int(held["step"]), float(held["objective"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}", hint="delete it: the next evaluation writes it again"
        ) from error


class BestKeeper:
    """Follows a run's evaluations, over kills and resumes.

    Args:
        directory: the run's folder.
        weights: of the held-out sources.
        world: the main rank reads and writes, all ranks know.
        start: the step that the run starts from; what came after it never happened.
    """

    def __init__(
        self, directory: Path, weights: Mapping[str, SourceWeights], world: World, start: int
    ) -> None:
        self._path = directory / FILENAME
        self._weights = weights
        self._writes = world.is_main
        found = world.from_main(lambda: read_best(directory) if start else None)
        self.best = found if found is not None and found.step <= start else None

    def objective(self, results: Mapping[str, Mapping[str, float]]) -> float:
        """See :func:`held_out_objective`."""
        return held_out_objective(results, self._weights)

    def keep(self, best: Best) -> None:
        """Write it down; its checkpoint must be whole by now."""
        self.best = best
        if self._writes:
            write_atomic(self._path, json.dumps(asdict(best)).encode())
