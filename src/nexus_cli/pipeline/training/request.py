"""What a training command asks for, checked before anything is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_cli.config.shared import LossWeights, TextData
from nexus_cli.config.train import ScheduleConfig, TrainConfig, weights_of
from nexus_cli.core.distill.schedule import Schedule
from nexus_cli.core.model.gpt_oss.adapter import read_conversion
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import model_dir
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.location import locate
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.teacher_store.manifest import FILENAME as STORE
from nexus_cli.io.teacher_store.reader import TeacherStore, open_store
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.adapters import model_or_adapter, require_use
from nexus_cli.pipeline.inputs import Artifact, model_input, stage_input

log = logging.getLogger(__name__)

ONLINE_STEPS = 1000
ONLINE_BATCH = 4
METADATA = "conversion_metadata.json"
PLAIN_DECAY = "cosine"
PLAIN_WARMUP = 0.05
RATIOS = {
    "warmup_ratio": "warmup_steps",
    "stable_ratio": "stable_steps",
    "kd_warmup_ratio": "kd_warmup_steps",
    "router_bias_freeze_ratio": "router_bias_freeze_step",
}


@dataclass(frozen=True)
class Request:
    """A run with its defaults worked out.

    Attributes:
        config: the user's settings.
        student: the model that learns.
        shape: its sizes.
        teacher: the original model, if one of its own is asked.
        store: the teacher store of an offline run.
        batch_size: sequences a forward pass.
        max_steps: optimizer steps.
        world_size: ranks.
        sources: names of the data sources.
        weights: what each source teaches.
        schedule: values of every step.
        store_source: the stage that wrote the store, and the digest of it, if it is the
            workspace's.
    """

    config: TrainConfig
    student: Artifact
    shape: ModelShape
    teacher: Artifact | None
    store: TeacherStore | None
    batch_size: int
    max_steps: int
    world_size: int
    sources: tuple[str, ...]
    weights: tuple[LossWeights, ...]
    schedule: Schedule
    store_source: tuple[str, str] | None = None

    @property
    def command(self) -> str:
        """The command that this is a run of."""
        return "train" if self.store is None else "train-offline"

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step, over all micro-batches and ranks."""
        return self.batch_size * self.config.gradient_accumulation_steps * self.world_size

    @property
    def seq_len(self) -> int:
        """Tokens a sequence."""
        return self.config.data.seq_len if self.store is None else self.store.plan.seq_len

    @property
    def keeps_best(self) -> bool:
        """Whether evaluations find a best checkpoint: an objective of 0 throughout has none."""
        evaluation = self.config.evaluation
        return evaluation.keep_best and evaluation.every is not None and _judges(self.config)

    @property
    def inputs(self) -> dict[str, Artifact]:
        """What the stage reads, by role."""
        inputs = {"student": self.student}
        if self.teacher is not None:
            inputs["teacher"] = self.teacher
        if self.store is not None:
            folder = Path(self.store.folder.shown)  # for the record: it may lie elsewhere
            inputs["store"] = Artifact(folder, self.store.manifest.digest, self.store_source)
        return inputs


def online_request(config: TrainConfig, workspace: Workspace, world_size: int) -> Request:
    """The request of ``nexus train``.

    Raises:
        ConfigError: the student has no shared expert, or settings contradict each other.
        WorkspaceError: no student is given and the workspace has none.
    """
    if config.teacher.store is not None:
        raise ConfigError(
            "a teacher store is read by nexus train-offline", hint="run: nexus train-offline"
        )
    teacher = None if config.teacher.model is None else model_input(config.teacher.model)
    if teacher is None and config.runtime.teacher_device is not None:
        raise ConfigError(
            "--teacher-device without --teacher-model: the student is its own teacher",
            hint="leave it out, or give --teacher-model",
        )
    if teacher is not None and world_size > 1:
        raise ConfigError(
            "a teacher on a device of its own works with one process",
            hint="leave --teacher-model out: the student is its own teacher on every GPU",
        )
    _require_judgement(config)
    student, shape = _student(config, workspace)
    max_steps = config.max_steps or ONLINE_STEPS
    return Request(
        config=config,
        student=student,
        shape=shape,
        teacher=teacher,
        store=None,
        batch_size=config.batch_size or ONLINE_BATCH,
        max_steps=max_steps,
        world_size=world_size,
        sources=tuple(source.name for source in config.data.sources),
        weights=weights_of(config.loss, [(s.name, s.loss) for s in config.data.sources]),
        schedule=make_schedule(config.schedule, max_steps),
    )


def offline_request(config: TrainConfig, workspace: Workspace, world_size: int) -> Request:
    """The request of ``nexus train-offline``.

    Raises:
        ConfigError: the store is too small, or settings need what a store does not hold.
        ArtifactError: the store is damaged, or of another model.
        WorkspaceError: student or store is not given and the workspace has none.
    """
    if config.teacher.model is not None:
        raise ConfigError(
            "a teacher model is asked by nexus train; train-offline reads a store",
            hint="give --precomputed-teacher, or run: nexus train",
        )
    if config.loss.divergence != "forward":
        raise ConfigError(
            f"the {config.loss.divergence} divergence needs the teacher's whole distribution, and "
            "a store holds its top K",
            hint="set loss.divergence to forward, or use nexus train",
        )
    _require_judgement(config)
    student, shape = _student(config, workspace)
    path, store_source = config.teacher.store, None
    if path is None:
        path, store_source = _workspace_store(workspace)
    store = open_store(
        locate(path),
        vocab_size=shape.vocab_size,
        tokenizer=sha256_file(student.path / "tokenizer.json"),
        teacher=_base_of(student.path),
    )
    batch_size = config.batch_size or store.plan.batch_size
    per_step = batch_size * config.gradient_accumulation_steps * world_size
    max_steps = config.max_steps or len(store) // per_step
    if max_steps < 1:
        raise ConfigError(
            f"{store.folder.shown} holds {len(store)} sequences, "
            f"and one optimizer step takes {per_step}",
            hint="lower --batch-size or --gradient-accumulation-steps",
        )
    schedule = make_schedule(config.schedule, max_steps)
    store.require_temperatures(schedule.temperatures)
    if config.teacher.tail == "samples":
        _require_samples(store, schedule)
    named = {source.name: source.loss for source in config.data.sources}
    sources = store.plan.sources
    weights = weights_of(config.loss, [(name, named.get(name)) for name in sources])
    if any(weight.router for weight in weights):
        raise ConfigError(
            "a teacher store holds no router logits, so there is no router KL offline",
            hint="set the sources' router weight to 0, or use nexus train",
        )
    return Request(
        config=config,
        student=student,
        shape=shape,
        teacher=None,
        store=store,
        batch_size=batch_size,
        max_steps=max_steps,
        world_size=world_size,
        sources=sources,
        weights=weights,
        schedule=schedule,
        store_source=store_source,
    )


def held_out_weights(config: TrainConfig) -> dict[str, LossWeights]:
    """What each source of held-out text counts by: as if it were trained on."""
    sources = (config.evaluation.data or config.data).sources
    named = [(source.name, source.loss) for source in sources]
    return {
        name: weights
        for (name, _), weights in zip(named, weights_of(config.loss, named), strict=True)
    }


def held_out_of(data: TextData) -> TextData | None:
    """The same sources, held-out part; those that train on everything have none."""
    sources = tuple(
        source.model_copy(update={"split": "held-out"})
        for source in data.sources
        if source.split in ("auto", "train")
    )
    return data.model_copy(update={"sources": sources}) if sources else None


def _judges(config: TrainConfig) -> bool:
    """Whether the held-out objective says anything: the router's loss is no part of it."""
    weights, data = held_out_weights(config), config.evaluation.data or held_out_of(config.data)
    names = weights if data is None else [source.name for source in data.sources]
    return any(weights[name].ce or weights[name].kd for name in names)


def _require_judgement(config: TrainConfig) -> None:
    if config.evaluation.patience is not None and not _judges(config):
        raise ConfigError(
            "evaluation.patience: no held-out source has a ce or kd weight, so every evaluation "
            "has an objective of 0 and none is better than another",
            hint="leave evaluation.patience out, or give a source a ce or kd weight",
        )


def _require_samples(store: TeacherStore, schedule: Schedule) -> None:
    if not store.plan.tail_samples:
        raise ConfigError(
            f"{store.folder.shown} holds no samples of the tail",
            hint="set teacher.tail to bucket, or precompute with --set tail_samples=16",
        )
    if any(temperature != 1 for temperature in schedule.temperatures):
        raise ConfigError(
            "samples of the tail were drawn at temperature 1",
            hint="keep the temperature at 1, or set teacher.tail to bucket",
        )


def _workspace_store(workspace: Workspace) -> tuple[str, tuple[str, str] | None]:
    """The store of the precompute stage; a whole one is of use even where the text ran out."""
    directory = workspace.stage_dir("precompute")
    if workspace.find("precompute") is None and (directory / STORE).is_file():
        log.warning("%s holds less than was asked for; training on what is there", directory)
        return str(directory), None
    found = stage_input(workspace, "precompute", None)
    return str(found.path), found.source


def _student(config: TrainConfig, workspace: Workspace) -> tuple[Artifact, ModelShape]:
    name = config.student
    require_use(config.base, name)
    if name is None:
        student = stage_input(workspace, "convert", None)
    else:
        student = model_or_adapter(name, workspace, config.base)
    shape = model_dir.read_shape(student.path)
    if not shape.num_shared_experts:
        raise ConfigError(
            f"{student.path} has no shared expert to train",
            hint=f"run: nexus convert --input {student.path} --output <folder>",
        )
    if config.runtime.adapter:
        read_conversion(student.path)  # now, not when the first checkpoint is due
    return student, shape


def _base_of(student: Path) -> str | None:
    """Fingerprint of the model that the student was converted from, if it says so."""
    if not (student / METADATA).is_file():
        return None
    base = model_dir.read_json(student / METADATA).get("base")
    if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), str):
        raise ArtifactError(f"{student / METADATA} does not name the base model")
    return str(base["fingerprint"])


def make_schedule(config: ScheduleConfig, max_steps: int) -> Schedule:
    """The values of every step of a run of ``max_steps``.

    Raises:
        ConfigError: the settings make no schedule, such as a warm-up and a stable part that are
            longer than the run.
    """
    given: dict[str, Any] = config.model_dump(exclude_none=True, exclude={"advanced"})
    try:
        if config.advanced:
            return Schedule.advanced(max_steps, **given)
        plain: dict[str, Any] = {"decay": PLAIN_DECAY, "warmup_ratio": PLAIN_WARMUP}
        plain |= given
        for ratio, steps in RATIOS.items():
            if ratio in plain:
                plain[steps] = round(plain.pop(ratio) * max_steps)
        return Schedule(total_steps=max_steps, **plain)
    except ValueError as error:
        raise ConfigError(f"train.schedule: {error}") from error
