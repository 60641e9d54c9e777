"""``nexus plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nexus_cli.cli.options import ConfigFile, DryRun, Force, Sets, WorkspaceDir, flag
from nexus_cli.config.load import resolve
from nexus_cli.config.plot import PlotConfig
from nexus_cli.io.workspace import DEFAULT_ROOT, Workspace


def plot(
    log_file: Annotated[list[str] | None, flag(PlotConfig, "log_file", "--log-file")] = None,
    output: Annotated[Path | None, flag(PlotConfig, "output", "--output")] = None,
    smooth_window: Annotated[
        int | None, flag(PlotConfig, "smooth_window", "--smooth-window")
    ] = None,
    report: Annotated[Path | None, flag(PlotConfig, "report", "--report")] = None,
    workspace: WorkspaceDir = DEFAULT_ROOT,
    config_file: ConfigFile = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    config = resolve(
        PlotConfig,
        "plot",
        file=config_file,
        sets=sets or (),
        log_file=log_file or None,
        output=output,
        smooth_window=smooth_window,
        report=report,
    )

    from nexus_cli.pipeline.plot import run

    run(config, Workspace(workspace), force=force, dry_run=dry_run)
