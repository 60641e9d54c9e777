"""Options that ``nexus train`` and ``nexus train-offline`` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nexus_cli.cli.options import flag
from nexus_cli.config.load import resolve
from nexus_cli.config.train import TrainConfig

T = TrainConfig

StudentModel = Annotated[str | None, flag(T, "student", "--student-model")]
Base = Annotated[str | None, flag(T, "base", "--base")]
MaxSteps = Annotated[int | None, flag(T, "max_steps", "--max-steps")]
BatchSize = Annotated[int | None, flag(T, "batch_size", "--batch-size")]
Accumulation = Annotated[
    int | None, flag(T, "gradient_accumulation_steps", "--gradient-accumulation-steps")
]
LearningRate = Annotated[float | None, flag(T, "optimizer.learning_rate", "--learning-rate")]
Optimizer = Annotated[str | None, flag(T, "optimizer.kind", "--optimizer")]
FreezeRouter = Annotated[
    bool, typer.Option("--freeze-router", help="Keep the router as it is (the default).")
]
TrainRouter = Annotated[bool, typer.Option("--train-router", help="Train the router too.")]
TrainRouterBias = Annotated[
    bool, typer.Option("--train-router-bias", help="Train the routers' biases alone.")
]
Advanced = Annotated[
    bool,
    typer.Option(
        "--use-advanced-scheduler", help="Train the router, with DeepSeek-V3 style schedules."
    ),
]
Seed = Annotated[int | None, flag(T, "data.seed", "--seed")]
EvalEvery = Annotated[int | None, flag(T, "evaluation.every", "--eval-every")]
SaveEvery = Annotated[int | None, flag(T, "runtime.save_every", "--save-every")]
KeepLast = Annotated[int | None, flag(T, "runtime.keep_last", "--keep-last")]
Adapter = Annotated[
    bool,
    typer.Option(
        "--adapter", help="Write checkpoints as adapters: what was trained, and the base's hash."
    ),
]
ReportTo = Annotated[str | None, flag(T, "runtime.report_to", "--report-to")]
Resume = Annotated[str | None, flag(T, "runtime.resume", "--resume")]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Two runs of the same command are equal bit for bit."),
]
OutputDir = Annotated[Path | None, flag(T, "output", "--output-dir", "--output")]


def resolve_training(
    file: Path | None,
    sets: Sequence[str] | None,
    flags: Mapping[str, Any],
    *,
    freeze_router: bool,
    train_router: bool,
    train_router_bias: bool,
    advanced: bool,
) -> TrainConfig:
    """The config of a training command; a switch that is off was not given."""
    switches = {
        "freeze_router": freeze_router or None,
        "train_router": train_router or None,
        "train_router_bias": train_router_bias or None,
        "schedule": {"advanced": advanced or None},
    }
    return resolve(TrainConfig, "train", file=file, sets=sets or (), **flags, **switches)
