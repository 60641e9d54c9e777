"""``nexus plot --schedule``: what a training will do step by step, before there is one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nexus_cli.config.plot import PlotConfig
from nexus_cli.config.train import TrainConfig, weights_of
from nexus_cli.io import console
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.disk import room_for
from nexus_cli.pipeline.plotting.schedule import STAGE_NAMES, Timeline, draw_schedule
from nexus_cli.pipeline.training.optimizer import peak_rates
from nexus_cli.pipeline.training.request import ONLINE_STEPS, make_schedule

log = logging.getLogger(__name__)


def run(
    config: PlotConfig, training: TrainConfig, workspace: Workspace, *, dry_run: bool = False
) -> None:
    """Draw the schedules of ``training`` and print their turning points.

    The values are those that the training loop will ask for, from the same functions. No model,
    text or device is looked at. What was drawn before is drawn anew.

    Args:
        config: ``output`` is the folder; the others are of no matter.
        training: the settings that ``nexus train`` would get.
        workspace: used where no output is given.
        dry_run: print, and draw nothing.

    Raises:
        ConfigError: the settings make no schedule.
        ResourceError: the disk is full.
    """
    console.configure()
    timeline = plan(training)
    _tell(timeline)
    for note in _notes(training):
        log.info("%s", note)
    if dry_run:
        return
    folder = (config.output or workspace.stage_dir("plot")).expanduser()
    with room_for(folder):
        folder.mkdir(parents=True, exist_ok=True)
        title = f"Schedules of {len(timeline.steps_N):,} optimizer steps"
        picture, _ = draw_schedule(timeline, title, folder)
    console.result(f"schedule: {picture}")


def plan(training: TrainConfig) -> Timeline:
    """Every value of every step of a run with these settings.

    Raises:
        ConfigError: the settings make no schedule.
    """
    return Timeline.of(
        make_schedule(training.schedule, training.max_steps or ONLINE_STEPS),
        peak_rates(training.optimizer),
        _kl_weights(training),
        _groups(training),
    )


def _groups(training: TrainConfig) -> list[str]:
    """The groups of parameters that train."""
    groups = ["shared experts", "gates"]
    groups += ["routers"] if training.whole_router_trains else []
    return [*groups, "router biases"] if training.router_trains else groups


def _kl_weights(training: TrainConfig) -> dict[str, float]:
    """Each KL weight of the mixture once, with the names of the text that has it."""
    sources = training.data.sources
    weights = weights_of(training.loss, [(source.name, source.loss) for source in sources])
    names: dict[float, list[str]] = {}
    for source, weight in zip(sources, weights, strict=True):
        names.setdefault(weight.kd, []).append(source.name.rpartition("/")[2])
    return {_listed(members): weight for weight, members in names.items()}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _tell(timeline: Timeline) -> None:
    columns = ("step", "stage", *(f"rate, {group}" for group in timeline.rates), "T", "kd weight")
    stages = [stage for stage, first, last in timeline.stages for _ in range(first, last + 1)]
    rows = []
    for step in timeline.turns:
        at = step - 1
        weights = " / ".join(f"{values_N[at]:.3g}" for values_N in timeline.kl.values())
        rates = (f"{values_N[at]:.3g}" for values_N in timeline.rates.values())
        temperature = f"{timeline.temperature_N[at]:.3g}"
        rows.append((f"{step:,}", STAGE_NAMES[stages[at]], *rates, temperature, weights))
    console.result_table("Schedules, where they turn", columns, rows)


def _notes(training: TrainConfig) -> list[str]:
    """What the curves leave unsaid."""
    notes = []
    if training.max_steps is None:
        notes.append(
            f"no --max-steps: drawn for {ONLINE_STEPS:,} steps, as nexus train takes; nexus "
            "train-offline takes one pass over its store"
        )
    if not training.router_trains:
        notes.append(
            "the routers are frozen and have no rates; --use-advanced-scheduler or --set "
            "train_router=true trains them"
        )
    return notes
