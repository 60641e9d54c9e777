"""``nexus train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nexus_cli.cli.options import ConfigFile, DryRun, Force, Sets, WorkspaceDir, flag
from nexus_cli.config.load import resolve
from nexus_cli.config.train import TrainConfig
from nexus_cli.io.workspace import DEFAULT_ROOT, Workspace

T = TrainConfig
FreezeRouter = Annotated[
    bool, typer.Option("--freeze-router", help="Keep the router as it is (the default).")
]
TrainRouter = Annotated[bool, typer.Option("--train-router", help="Train the router too.")]
Advanced = Annotated[
    bool,
    typer.Option(
        "--use-advanced-scheduler", help="Train the router, with DeepSeek-V3 style schedules."
    ),
]


def train(
    student_model: Annotated[str | None, flag(T, "student", "--student-model")] = None,
    teacher_model: Annotated[str | None, flag(T, "teacher.model", "--teacher-model")] = None,
    student_device: Annotated[
        str | None, flag(T, "runtime.device", "--student-device", "--device")
    ] = None,
    teacher_device: Annotated[
        str | None, flag(T, "runtime.teacher_device", "--teacher-device")
    ] = None,
    data: Annotated[str | None, flag(T, "data.sources", "--data")] = None,
    data_dir: Annotated[Path | None, flag(T, "data.data_dir", "--data-dir")] = None,
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
        teacher={"model": teacher_model},
        data={"sources": data, "data_dir": data_dir},
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        optimizer={"learning_rate": learning_rate},
        freeze_router=freeze_router or None,
        train_router=train_router or None,
        schedule={"advanced": use_advanced_scheduler or None},
        runtime={
            "device": student_device,
            "teacher_device": teacher_device,
            "save_every": save_every,
            "keep_last": keep_last,
            "resume": resume,
        },
        output=output_dir,
    )

    from nexus_cli.pipeline.train import run_online

    run_online(config, Workspace(workspace), force=force, dry_run=dry_run)
