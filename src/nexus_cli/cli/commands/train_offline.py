"""``nexus train-offline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nexus_cli.cli.commands.train import Advanced, FreezeRouter, TrainRouter
from nexus_cli.cli.options import ConfigFile, DryRun, Force, Sets, WorkspaceDir, flag
from nexus_cli.config.load import resolve
from nexus_cli.config.train import TrainConfig
from nexus_cli.io.workspace import DEFAULT_ROOT, Workspace

T = TrainConfig


def train_offline(
    precomputed_teacher: Annotated[
        Path | None, flag(T, "teacher.store", "--precomputed-teacher")
    ] = None,
    student_model: Annotated[str | None, flag(T, "student", "--student-model")] = None,
    device: Annotated[str | None, flag(T, "runtime.device", "--device")] = None,
    max_steps: Annotated[int | None, flag(T, "max_steps", "--max-steps")] = None,
    batch_size: Annotated[int | None, flag(T, "batch_size", "--batch-size")] = None,
    gradient_accumulation_steps: Annotated[
        int | None, flag(T, "gradient_accumulation_steps", "--gradient-accumulation-steps")
    ] = None,
    learning_rate: Annotated[
        float | None, flag(T, "optimizer.learning_rate", "--learning-rate")
    ] = None,
    freeze_router: FreezeRouter = False,
    train_router: TrainRouter = False,
    use_advanced_scheduler: Advanced = False,
    save_every: Annotated[int | None, flag(T, "runtime.save_every", "--save-every")] = None,
    keep_last: Annotated[int | None, flag(T, "runtime.keep_last", "--keep-last")] = None,
    resume: Annotated[str | None, flag(T, "runtime.resume", "--resume")] = None,
    output_dir: Annotated[Path | None, flag(T, "output", "--output-dir", "--output")] = None,
    workspace: WorkspaceDir = DEFAULT_ROOT,
    config_file: ConfigFile = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    config = resolve(
        TrainConfig,
        "train",
        file=config_file,
        sets=sets or (),
        student=student_model,
        teacher={"store": precomputed_teacher},
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        optimizer={"learning_rate": learning_rate},
        freeze_router=freeze_router or None,
        train_router=train_router or None,
        schedule={"advanced": use_advanced_scheduler or None},
        runtime={
            "device": device,
            "save_every": save_every,
            "keep_last": keep_last,
            "resume": resume,
        },
        output=output_dir,
    )

    from nexus_cli.pipeline.train import run_offline

    run_offline(config, Workspace(workspace), force=force, dry_run=dry_run)
