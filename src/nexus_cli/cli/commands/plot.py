"""``nexus plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nexus_cli.cli import training_options
from nexus_cli.cli.options import ConfigFile, DryRun, Force, Sets, WorkspaceDir, flag
from nexus_cli.config.load import resolve
from nexus_cli.config.plot import PlotConfig
from nexus_cli.config.train import TrainConfig
from nexus_cli.errors import ConfigError
from nexus_cli.io.workspace import DEFAULT_ROOT, Workspace

Schedule = Annotated[
    bool,
    typer.Option(
        "--schedule",
        help="Draw the schedules of a training before it runs: --config, --set, --max-steps and "
        "--use-advanced-scheduler as nexus train takes them.",
    ),
]


def plot(
    log_file: Annotated[list[str] | None, flag(PlotConfig, "log_file", "--log-file")] = None,
    output: Annotated[Path | None, flag(PlotConfig, "output", "--output")] = None,
    smooth_window: Annotated[
        int | None, flag(PlotConfig, "smooth_window", "--smooth-window")
    ] = None,
    report: Annotated[Path | None, flag(PlotConfig, "report", "--report")] = None,
    schedule: Schedule = False,
    max_steps: training_options.MaxSteps = None,
    use_advanced_scheduler: training_options.Advanced = False,
    workspace: WorkspaceDir = DEFAULT_ROOT,
    config_file: ConfigFile = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    _require_one_purpose(
        {"--log-file": log_file, "--smooth-window": smooth_window, "--report": report},
        {"--max-steps": max_steps, "--use-advanced-scheduler": use_advanced_scheduler},
        schedule=schedule,
    )
    config = resolve(
        PlotConfig,
        "plot",
        file=config_file,
        sets=() if schedule else sets or (),
        log_file=log_file or None,
        output=output,
        smooth_window=smooth_window,
        report=report,
    )
    if schedule:
        training = resolve(
            TrainConfig,
            "train",
            file=config_file,
            sets=[text.removeprefix("train.") for text in sets or ()],
            max_steps=max_steps,
            schedule={"advanced": use_advanced_scheduler or None},
        )

        from nexus_cli.pipeline import plot_schedule

        plot_schedule.run(config, training, Workspace(workspace), dry_run=dry_run)
        return

    from nexus_cli.pipeline.plot import run

    run(config, Workspace(workspace), force=force, dry_run=dry_run)


def _require_one_purpose(
    of_runs: dict[str, object], of_schedules: dict[str, object], *, schedule: bool
) -> None:
    """Refuse a flag that would be of no effect."""
    given = [name for name, value in (of_runs if schedule else of_schedules).items() if value]
    if given and schedule:
        raise ConfigError(
            f"--schedule draws no run, so {given[0]} says nothing", hint=f"leave {given[0]} out"
        )
    if given:
        raise ConfigError(f"{given[0]} is of --schedule", hint="add --schedule")
