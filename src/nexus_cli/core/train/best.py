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
from nexus_cli.io.metrics import FILENAME as METRICS
from nexus_cli.io.metrics import read_metrics

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

    What counts is in ``metrics.jsonl``, which a resumed run cuts at its start: an evaluation is
    written there before its checkpoint is, so none is lost between the two. ``best.json`` is for
    readers, and for whoever prunes checkpoints.

    Args:
        directory: the run's folder.
        weights: of the held-out sources.
        world: the main rank reads and writes, all ranks know.
        start: the step that the run starts from; what came after it never happened.
        judge: names text and weights; evaluations by another judge are not comparable.

    Attributes:
        best: so far; ``None`` before the first evaluation.
        since: evaluations after it.
    """

    def __init__(
        self,
        directory: Path,
        weights: Mapping[str, SourceWeights],
        world: World,
        start: int,
        judge: str = "",
    ) -> None:
        self._directory, self._writes = directory, world.is_main
        self._weights, self.judge = weights, judge
        self.best: Best | None = None
        self.since = 0
        for step, objective in world.from_main(lambda: _judged(directory, judge, start)):
            self.see(step, objective)
        if self.best is not None:
            self.write()

    @property
    def replay(self) -> list[str]:
        """Sources that are only to be held, not learned."""
        return [name for name, weight in self._weights.items() if weight.kd and not weight.ce]

    def objective(self, results: Mapping[str, Mapping[str, float]]) -> float:
        """See :func:`held_out_objective`."""
        return held_out_objective(results, self._weights)

    def see(self, step: int, objective: float) -> bool:
        """Whether an evaluation is the best so far; a tie is not."""
        if self.best is None or objective < self.best.objective:
            self.best, self.since = Best(step, objective), 0
            return True
        self.since += 1
        return False

    def write(self) -> None:
        """Write the best down; its checkpoint must be whole by now."""
        if self._writes and self.best is not None:
            write_atomic(self._directory / FILENAME, json.dumps(asdict(self.best)).encode())


def _judged(directory: Path, judge: str, start: int) -> list[tuple[int, float]]:
    """Steps and objectives of the evaluations up to ``start``; none for a run that starts."""
    if not start or not (directory / METRICS).is_file():
        return []
    return [
        (record["step"], record["held_out_objective"])
        for record in read_metrics(directory)
        if record["step"] <= start
        and record.get("judge") == judge
        and record.get("held_out_objective") is not None
    ]
