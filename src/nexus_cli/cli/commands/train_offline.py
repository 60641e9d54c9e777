"""``nexus train-offline``."""

from __future__ import annotations

from typing import Annotated

from nexus_cli.cli import training_options as options
from nexus_cli.cli.options import (
    ConfigFile,
    DryRun,
    ExpertsBackend,
    Force,
    Sets,
    WorkspaceDir,
    flag,
)
from nexus_cli.config.train import TrainConfig
from nexus_cli.io.workspace import DEFAULT_ROOT, Workspace

T = TrainConfig


def train_offline(
    precomputed_teacher: Annotated[
        str | None, flag(T, "teacher.store", "--precomputed-teacher")
    ] = None,
    student_model: options.StudentModel = None,
    base: options.Base = None,
    device: Annotated[str | None, flag(T, "runtime.device", "--device")] = None,
    max_steps: options.MaxSteps = None,
    batch_size: options.BatchSize = None,
    gradient_accumulation_steps: options.Accumulation = None,
    learning_rate: options.LearningRate = None,
    optimizer: options.Optimizer = None,
    freeze_router: options.FreezeRouter = False,
    train_router: options.TrainRouter = False,
    train_router_bias: options.TrainRouterBias = False,
    use_advanced_scheduler: options.Advanced = False,
    seed: options.Seed = None,
    eval_every: options.EvalEvery = None,
    save_every: options.SaveEvery = None,
    keep_last: options.KeepLast = None,
    adapter: options.Adapter = False,
    report_to: options.ReportTo = None,
    resume: options.Resume = None,
    experts_backend: ExpertsBackend = None,
    deterministic: options.Deterministic = False,
    output_dir: options.OutputDir = None,
    workspace: WorkspaceDir = DEFAULT_ROOT,
    config_file: ConfigFile = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    flags = {
        "student": student_model,
        "base": base,
        "teacher": {"store": precomputed_teacher},
        "data": {"seed": seed},
        "max_steps": max_steps,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "optimizer": {"learning_rate": learning_rate, "kind": optimizer},
        "evaluation": {"every": eval_every},
        "runtime": {
            "device": device,
            "save_every": save_every,
            "keep_last": keep_last,
            "adapter": adapter or None,
            "report_to": report_to,
            "resume": resume,
            "experts_backend": experts_backend,
            "deterministic": deterministic or None,
        },
        "output": output_dir,
    }
    config = options.resolve_training(
        config_file,
        sets,
        flags,
        freeze_router=freeze_router,
        train_router=train_router,
        train_router_bias=train_router_bias,
        advanced=use_advanced_scheduler,
    )

    from nexus_cli.pipeline.train import run_offline

    run_offline(config, Workspace(workspace), force=force, dry_run=dry_run)
