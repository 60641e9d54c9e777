"""``nexus collect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nexus_cli.cli.options import (
    ConfigFile,
    DryRun,
    ExpertsBackend,
    Force,
    Sets,
    WorkspaceDir,
    flag,
)
from nexus_cli.config.collect import CollectConfig
from nexus_cli.config.load import resolve
from nexus_cli.io.workspace import DEFAULT_ROOT, Workspace


def collect(
    model: Annotated[str | None, flag(CollectConfig, "model", "--model")] = None,
    target_tokens: Annotated[
        int | None, flag(CollectConfig, "target_tokens", "--target-tokens")
    ] = None,
    max_candidates: Annotated[
        int | None, flag(CollectConfig, "max_candidates", "--max-candidates")
    ] = None,
    batch_select: Annotated[
        int | None, flag(CollectConfig, "batch_select", "--batch-select")
    ] = None,
    num_processes: Annotated[
        int | None, flag(CollectConfig, "runtime.num_processes", "--num-processes")
    ] = None,
    output: Annotated[Path | None, flag(CollectConfig, "output", "--output")] = None,
    data: Annotated[str | None, flag(CollectConfig, "data.sources", "--data")] = None,
    data_dir: Annotated[Path | None, flag(CollectConfig, "data.data_dir", "--data-dir")] = None,
    device: Annotated[str | None, flag(CollectConfig, "runtime.device", "--device")] = None,
    experts_backend: ExpertsBackend = None,
    workspace: WorkspaceDir = DEFAULT_ROOT,
    config_file: ConfigFile = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    config = resolve(
        CollectConfig,
        "collect",
        file=config_file,
        sets=sets or (),
        model=model,
        target_tokens=target_tokens,
        max_candidates=max_candidates,
        batch_select=batch_select,
        output=output,
        data={"sources": data, "data_dir": data_dir},
        runtime={
            "num_processes": num_processes,
            "device": device,
            "experts_backend": experts_backend,
        },
    )

    from nexus_cli.pipeline.collect import run

    run(config, Workspace(workspace), force=force, dry_run=dry_run)
