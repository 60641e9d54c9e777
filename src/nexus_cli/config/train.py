"""Settings of ``nexus train`` and ``nexus train-offline``: one model, one block, ``train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from nexus_cli.config.base import ConfigModel, RuntimeConfig, check_device
from nexus_cli.config.places import FolderOrUri
from nexus_cli.config.shared import AdapterBase, Dtype, LossWeights, TextData


class OptimizerConfig(ConfigModel):
    """AdamW over fp32 masters."""

    kind: Literal["adamw", "adamw-8bit"] = Field(
        "adamw",
        description="adamw: fp32 moments. adamw-8bit: 8-bit moments, and masters split into the "
        "bf16 weight and an exact remainder, for small cards.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak rate of the shared experts.")
    gate_learning_rate: float = Field(
        5e-3, gt=0, description="Peak rate of the gates, one number a layer, which start at 0."
    )
    router_learning_rate: float = Field(1e-5, gt=0, description="Peak rate of trained routers.")
    weight_decay: float = Field(0.01, ge=0, description="Of matrices; gates and biases have none.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment.")
    epsilon: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of a step's gradient.")


class ScheduleConfig(ConfigModel):
    """How rates, temperature and kd weight change; what is not given follows ``advanced``."""

    advanced: bool = Field(
        False, description="The DeepSeek-V3 style set of schedules, with a trained router."
    )
    decay: Literal["constant", "linear", "cosine", "wsd"] | None = Field(
        None, description="Shape of the learning rate after the warm-up (cosine)."
    )
    warmup_ratio: float | None = Field(
        None, ge=0, le=1, description="Share of the steps in the warm-up (0.05; advanced 0.5)."
    )
    stable_ratio: float | None = Field(
        None, ge=0, le=1, description="Share of the steps at the peak (advanced 0.2)."
    )
    final_ratio: float = Field(0.1, ge=0, le=1, description="Final rate relative to the peak.")
    temperature: float | None = Field(
        None, gt=0, description="Of both distributions in kd (1; advanced 4)."
    )
    final_temperature: float | None = Field(
        None, gt=0, description="At the end (as at the start; advanced 2)."
    )
    temperature_hold: float | None = Field(
        None, ge=0, le=1, description="Share of the steps before it moves (0; advanced 0.3)."
    )
    kd_warmup_ratio: float | None = Field(
        None, ge=0, le=1, description="Share of the steps over which the kd weight rises (0)."
    )
    router_bias_multiplier: float | None = Field(
        None, ge=0, description="Rate of router biases relative to routers (1; advanced 0.001)."
    )
    router_bias_freeze_ratio: float | None = Field(
        None, ge=0, le=1, description="When router biases freeze (never; advanced: warm-up's end)."
    )

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.advanced and (self.decay is not None or self.kd_warmup_ratio is not None):
            raise ValueError("the advanced schedule has its own decay and kd warm-up")
        return self


class LossConfig(ConfigModel):
    """What the text of each source teaches, unless the source itself says."""

    domain: LossWeights = Field(
        default_factory=LossWeights, description="Weights of text to be learned."
    )
    replay: LossWeights = Field(
        default_factory=lambda: LossWeights(ce=0.0, kd=1.0),
        description="Weights of text that only holds the model to what it was.",
    )
    replay_sources: tuple[str, ...] = Field(
        ("nemotron-general", "bundled-general"),
        description="Sources that are replay wherever another source is in the mixture.",
    )
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward",
        description="From the teacher's vocabulary: forward KL(teacher || student); reverse "
        "KL(student || teacher) and jsd need the teacher in memory, and do without the head's "
        "GPU kernels.",
    )
    jsd_beta: float = Field(
        0.5, ge=0.001, le=0.999, description="Of jsd: share of the teacher in the mixture."
    )
    router_temperature: float = Field(1.0, gt=0, description="Of the routers' KL.")
    load_balance: float | None = Field(
        None, ge=0, description="Weight of the load-balance loss (0.01 if the router trains)."
    )
    router_z: float | None = Field(
        None, ge=0, description="Weight of the router z-loss (0.001 if the router trains)."
    )

    @model_validator(mode="after")
    def _beta_is_of_jsd(self) -> Self:
        default = LossConfig.model_fields["jsd_beta"].default
        if self.divergence != "jsd" and self.jsd_beta != default:
            raise ValueError(f"jsd_beta is of the jsd divergence, not of {self.divergence}")
        return self


class AveragingConfig(ConfigModel):
    """SFA: pull the weights back towards an anchor (arXiv 2501.05559)."""

    every: int | None = Field(None, gt=0, description="Steps between merges; none by default.")
    beta: float = Field(0.25, gt=0, le=1, description="Weight of the anchor in a merge.")
    anchor: Literal["start", "previous"] = Field(
        "start", description="start: the weights at the start. previous: those after the last."
    )


class EvaluationConfig(ConfigModel):
    """Loss on held-out text while training."""

    every: int | None = Field(100, gt=0, description="Steps between evaluations; null for never.")
    sequences: int = Field(32, gt=0, description="Held-out sequences, shared by the sources.")
    data: TextData | None = Field(
        None, description="Text to judge by; by default the held-out part of the training text."
    )
    keep_best: bool = Field(
        True, description="Save and keep the checkpoint that is best on held-out text."
    )
    patience: int | None = Field(
        None, gt=0, description="Evaluations without improvement after which the run ends."
    )

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.patience is not None and (self.every is None or not self.keep_best):
            raise ValueError("patience needs evaluations (every) and keep_best")
        return self


class TeacherConfig(ConfigModel):
    """Where the original model's view comes from: the student itself, a model, or a store."""

    model: str | None = Field(
        None, description="The original model; by default the student without its shared experts."
    )
    store: FolderOrUri | None = Field(
        None,
        description="Teacher store that nexus precompute wrote: a folder, or s3://, gs://, hf://.",
    )
    shuffle: bool = Field(
        False, description="Read a store in random order from the first pass on, not the second."
    )
    tail: Literal["bucket", "samples"] = Field(
        "bucket",
        description="Of the tokens that a store does not keep: their mass in one bucket, or the "
        "samples that it holds (right on average, noisy, T = 1).",
    )


class TrainRuntime(RuntimeConfig):
    """How a run is carried out; none of it changes what is learned."""

    batch_size: int = Field(8, gt=0, description="Sequences a forward pass on held-out text.")
    teacher_device: str | None = Field(
        None, description="Device of --teacher-model; by default the student's."
    )
    resume: str = Field(
        "auto", description="auto: go on with an unfinished run. never, or a checkpoint's path."
    )
    save_every: int | None = Field(100, gt=0, description="Steps between checkpoints.")
    keep_last: int = Field(3, gt=0, description="Checkpoints that stay on disk.")
    adapter: bool = Field(
        False, description="Write checkpoints as adapters: what was trained, and the base's hash."
    )
    log_every: int = Field(10, gt=0, description="Steps between log lines.")
    watch_every: int = Field(10, gt=0, description="Steps between measurements of the router.")
    gradient_checkpointing: bool = Field(
        False, description="Compute layers again in the backward pass, to save memory."
    )
    memory_gib: float | None = Field(
        None, gt=0, description="GPU memory that the run may take in all (what is free, less 1)."
    )
    cuda_graphs: bool = Field(
        True, description="On a GPU, replay micro-batches of few tokens as CUDA graphs."
    )
    deterministic: bool = Field(
        False, description="Only deterministic operations: two runs are equal bit for bit."
    )
    explosion: float | None = Field(
        5.0,
        gt=0,
        description="Stop where the loss is this many nats, and three times, above its median for "
        "three steps in a row; null for never.",
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="Trackers that get the metrics too."
    )
    head_chunk: int = Field(512, gt=0, description="Positions whose logits exist at one time.")

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @field_validator("teacher_device")
    @classmethod
    def _known_device(cls, value: str | None) -> str | None:
        return None if value is None else check_device(value)


class TrainConfig(ConfigModel):
    """Which student learns from which teacher and text, and for how long."""

    student: str | None = Field(
        None,
        description="Converted model, checkpoint, adapter or hf://OWNER/ADAPTER; by default "
        "the convert stage's.",
    )
    base: AdapterBase = None
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    data: TextData = Field(default_factory=TextData)
    dtype: Dtype = Field("auto", description="Of frozen weights: bfloat16 on a GPU, else float32.")
    max_steps: int | None = Field(
        None, gt=0, description="Optimizer steps (train: 1000; train-offline: one pass)."
    )
    batch_size: int | None = Field(
        None, gt=0, description="Sequences a forward pass (train: 4; train-offline: the store's)."
    )
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="Forward passes a step, on each rank."
    )
    freeze_router: bool | None = Field(None, description="Keep the router as it is (the default).")
    train_router: bool = Field(False, description="Train the router too.")
    train_router_bias: bool = Field(False, description="Train the routers' biases alone.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    averaging: AveragingConfig = Field(default_factory=AveragingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    runtime: TrainRuntime = Field(default_factory=TrainRuntime)
    output: Path | None = Field(None, description="Folder of checkpoints, metrics and log.")

    @model_validator(mode="after")
    def _one_router(self) -> Self:
        asks = {
            "--train-router": self.train_router,
            "--use-advanced-scheduler": self.schedule.advanced,
            "--train-router-bias": self.train_router_bias,
        }
        flags = [flag for flag, given in asks.items() if given]
        if self.freeze_router and flags:
            raise ValueError(f"--freeze-router contradicts {flags[0]}, which trains the router")
        if self.train_router_bias and self.whole_router_trains:
            raise ValueError(
                f"--train-router-bias contradicts {flags[0]}, which trains the routers' weights too"
            )
        asked = {"load_balance": self.loss.load_balance, "router_z": self.loss.router_z}
        for name, weight in asked.items():
            if weight and not self.router_trains:
                raise ValueError(f"loss.{name} acts on the router alone, and the router is frozen")
        return self

    @property
    def router_trains(self) -> bool:
        """Whether the routers are among the trained tensors, their biases at least."""
        return self.whole_router_trains or self.train_router_bias

    @property
    def whole_router_trains(self) -> bool:
        """Whether the routers' weights train as well as their biases."""
        return self.train_router or self.schedule.advanced


def weights_of(
    loss: LossConfig, sources: Sequence[tuple[str, LossWeights | None]]
) -> tuple[LossWeights, ...]:
    """What each source teaches: what it says itself, or what its role in the mixture says.

    A replay source keeps to kd only where there is something else to learn from.
    """
    is_mixture = any(name not in loss.replay_sources for name, _ in sources)
    return tuple(
        own or (loss.replay if is_mixture and name in loss.replay_sources else loss.domain)
        for name, own in sources
    )
