"""``nexus precompute``."""

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
from nexus_cli.config.load import resolve
from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.io.workspace import DEFAULT_ROOT, Workspace


def precompute(
    model: Annotated[
        str | None, flag(PrecomputeConfig, "model", "--teacher-model", "--model")
    ] = None,
    output: Annotated[
        Path | None, flag(PrecomputeConfig, "output", "--output-dir", "--output")
    ] = None,
    num_steps: Annotated[int | None, flag(PrecomputeConfig, "num_steps", "--num-steps")] = None,
    batch_size: Annotated[int | None, flag(PrecomputeConfig, "batch_size", "--batch-size")] = None,
    seq_len: Annotated[int | None, flag(PrecomputeConfig, "data.seq_len", "--seq-len")] = None,
    top_k: Annotated[int | None, flag(PrecomputeConfig, "top_k", "--top-k")] = None,
    top_p: Annotated[float | None, flag(PrecomputeConfig, "top_p", "--top-p")] = None,
    compression: Annotated[
        str | None, flag(PrecomputeConfig, "compression", "--compression")
    ] = None,
    data: Annotated[str | None, flag(PrecomputeConfig, "data.sources", "--data")] = None,
    data_dir: Annotated[Path | None, flag(PrecomputeConfig, "data.data_dir", "--data-dir")] = None,
    device: Annotated[str | None, flag(PrecomputeConfig, "runtime.device", "--device")] = None,
    experts_backend: ExpertsBackend = None,
    workspace: WorkspaceDir = DEFAULT_ROOT,
    config_file: ConfigFile = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    config = resolve(
        PrecomputeConfig,
        "precompute",
        file=config_file,
        sets=sets or (),
        model=model,
        output=output,
        num_steps=num_steps,
        batch_size=batch_size,
        top_k=top_k,
        top_p=top_p,
        compression=compression,
        data={"sources": data, "data_dir": data_dir, "seq_len": seq_len},
        runtime={"device": device, "experts_backend": experts_backend},
    )

    from nexus_cli.pipeline.precompute import run

    run(config, Workspace(workspace), force=force, dry_run=dry_run)
