"""``nexus convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nexus_cli.cli.options import ConfigFile, DryRun, Force, Sets, WorkspaceDir, flag
from nexus_cli.config.convert import ConvertConfig
from nexus_cli.config.load import resolve
from nexus_cli.io.workspace import DEFAULT_ROOT, Workspace


def convert(
    model: Annotated[str | None, flag(ConvertConfig, "model", "--input", "--model")] = None,
    base: Annotated[str | None, flag(ConvertConfig, "base", "--base")] = None,
    output: Annotated[Path | None, flag(ConvertConfig, "output", "--output")] = None,
    pca_stats: Annotated[Path | None, flag(ConvertConfig, "pca_stats", "--pca-stats")] = None,
    init_strategy: Annotated[
        str | None, flag(ConvertConfig, "init_strategy", "--init-strategy")
    ] = None,
    start: Annotated[str | None, flag(ConvertConfig, "start", "--start")] = None,
    output_scale: Annotated[
        float | None, flag(ConvertConfig, "output_scale", "--output-scale")
    ] = None,
    num_shared_experts: Annotated[
        int | None, flag(ConvertConfig, "num_shared_experts", "--num-shared-experts")
    ] = None,
    shared_intermediate_size: Annotated[
        int | None, flag(ConvertConfig, "shared_intermediate_size", "--shared-intermediate-size")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the original shards; do not link them.")
    ] = False,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Write a converted model or a checkpoint as an adapter."),
    ] = False,
    push_to_hub: Annotated[str | None, flag(ConvertConfig, "push_to_hub", "--push-to-hub")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Push to a public repository; a new one is private.")
    ] = False,
    workspace: WorkspaceDir = DEFAULT_ROOT,
    config_file: ConfigFile = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    config = resolve(
        ConvertConfig,
        "convert",
        file=config_file,
        sets=sets or (),
        model=model,
        base=base,
        output=output,
        pca_stats=pca_stats,
        init_strategy=init_strategy,
        start=start,
        output_scale=output_scale,
        num_shared_experts=num_shared_experts,
        shared_intermediate_size=shared_intermediate_size,
        copy_shards=copy or None,
        adapter=adapter or None,
        push_to_hub=push_to_hub,
        public=public or None,
    )

    from nexus_cli.pipeline.convert import run

    run(config, Workspace(workspace), force=force, dry_run=dry_run)
