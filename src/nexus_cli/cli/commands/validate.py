"""``nexus validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nexus_cli.cli.options import (
    ConfigFile,
    DryRun,
    ExpertsBackend,
    Force,
    Sets,
    WorkspaceDir,
    flag,
)
from nexus_cli.config.load import resolve
from nexus_cli.config.validate import ValidateConfig
from nexus_cli.io.workspace import DEFAULT_ROOT, Workspace


def validate(
    model: Annotated[str | None, flag(ValidateConfig, "checkpoint", "--model")] = None,
    base: Annotated[str | None, flag(ValidateConfig, "base", "--base")] = None,
    baseline: Annotated[str | None, flag(ValidateConfig, "baseline", "--baseline")] = None,
    precomputed_teacher: Annotated[
        str | None, flag(ValidateConfig, "store", "--precomputed-teacher")
    ] = None,
    compute_perplexity: Annotated[
        bool, typer.Option("--compute-perplexity", help="Score text (done unless --chat is alone).")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk to the model; beside the baseline if one is named.")
    ] = False,
    data: Annotated[str | None, flag(ValidateConfig, "domain", "--data")] = None,
    general_data: Annotated[str | None, flag(ValidateConfig, "general", "--general-data")] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Folder with local copies of the data sets.")
    ] = None,
    max_degradation: Annotated[
        float | None, flag(ValidateConfig, "max_degradation", "--max-degradation")
    ] = None,
    output: Annotated[Path | None, flag(ValidateConfig, "output", "--output")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, and nothing else, on stdout.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")
    ] = None,
    experts_backend: ExpertsBackend = None,
    workspace: WorkspaceDir = DEFAULT_ROOT,
    config_file: ConfigFile = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    folder = None if data_dir is None else str(data_dir)
    config = resolve(
        ValidateConfig,
        "validate",
        file=config_file,
        sets=sets or (),
        checkpoint=model,
        base=base,
        baseline=baseline,
        store=precomputed_teacher,
        compute_perplexity=compute_perplexity or None,
        domain={"sources": data, "data_dir": folder},
        general={"sources": general_data, "data_dir": folder},
        max_degradation=max_degradation,
        output=output,
        runtime={"device": device, "experts_backend": experts_backend},
    )

    from nexus_cli.pipeline.validate import Mode, run

    mode = Mode(check=compute_perplexity or not chat, chat=chat, json=json)
    run(config, Workspace(workspace), mode=mode, force=force, dry_run=dry_run)
