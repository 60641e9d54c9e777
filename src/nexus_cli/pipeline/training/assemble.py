"""Load the models of a run and put its parts together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nexus_cli.core.distill.anchor import Anchor
from nexus_cli.core.distill.model_teacher import ModelTeacher
from nexus_cli.core.distill.self_teacher import SelfTeacher, frozen_routers
from nexus_cli.core.distill.store_teacher import StoreTeacher
from nexus_cli.core.distill.teacher import Teacher
from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.adapter import write_adapter
from nexus_cli.core.model.gpt_oss.export import original_routers, write_model_directory
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.surgery import trainable_names
from nexus_cli.core.train.best import BestKeeper
from nexus_cli.core.train.checkpoints import save_checkpoint
from nexus_cli.core.train.evaluation import HeldOut, evaluate
from nexus_cli.core.train.feed import Feed, StepBatches
from nexus_cli.core.train.loop import LoopSettings, Progress
from nexus_cli.core.train.optim import read_master, write_master
from nexus_cli.core.train.precision import frozen_dtype, promote
from nexus_cli.core.train.recompute import recompute_layers
from nexus_cli.core.train.state import (
    TrainingState,
    exact_masters,
    gather_rng,
    optimizer_moments,
)
from nexus_cli.core.train.step import DistillationStep, Objective, SourceWeights
from nexus_cli.errors import ArtifactError, ResourceError
from nexus_cli.io.hashing import sha256_json
from nexus_cli.pipeline.training.memory import spend_memory
from nexus_cli.pipeline.training.optimizer import (
    make_optimizer,
    peak_rates,
    require_exact_sums,
    splits,
)
from nexus_cli.pipeline.training.request import Request, held_out_weights

log = logging.getLogger(__name__)

LOAD_BALANCE = 0.01
ROUTER_Z = 0.001


@dataclass(frozen=True)
class Models:
    """The student with what trains of it, and who teaches it.

    Attributes:
        step: student and objective as one module.
        masters: the parameters that train, by name: fp32, or bf16 where the optimizer keeps
            what is missing to that.
        optimizer: over the masters.
        teacher: gives the signal of every batch.
        judge: the teacher to measure held-out text with; a store knows only its own text.
    """

    step: DistillationStep
    masters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    teacher: Teacher
    judge: Teacher


def load_models(request: Request, world: World, teacher_device: torch.device) -> Models:
    """Load the student, and the teacher if it is a model of its own.

    Raises:
        ArtifactError: a model is damaged, or the student was not made from the teacher.
        ConfigError: the optimizer cannot sum gradients as the step is split.
    """
    require_exact_sums(request)
    config = request.config
    dtype = frozen_dtype(config.dtype, world.device)
    student = load_model(
        request.student.path,
        device=world.device,
        dtype=dtype,
        experts_backend=config.runtime.experts_backend,
    )
    trained = original_routers(request.student.path)  # a student may be a checkpoint
    routers = frozen_routers(student) if config.router_trains or trained else {}
    for name, tensor in trained.items():
        routers[name.removeprefix("model.")].copy_(tensor)
    names = trainable_names(
        student,
        train_router=config.whole_router_trains,
        train_router_bias=config.train_router_bias,
    )
    masters = promote(student, names, split=splits(request))
    engine = student.model.engine
    if engine is None and config.runtime.gradient_checkpointing:
        recompute_layers(student)
    tell_trainables(masters)
    itself = SelfTeacher(student, router_logits=True, frozen=routers)
    teacher: Teacher = itself
    if request.store is not None:
        samples = request.config.teacher.tail == "samples"
        teacher = StoreTeacher(request.store, dense=request.store.dense, samples=samples)
    elif request.teacher is not None:
        teacher = _model_teacher(request, student, dtype, teacher_device)
    if engine is not None:
        spend_memory(engine, request, masters, world.device)
    return Models(
        step=DistillationStep(student, _objective(request)).to(world.device),
        masters=masters,
        optimizer=make_optimizer(request, masters),
        teacher=teacher,
        judge=itself if request.store is not None else teacher,
    )


def tell_trainables(masters: Mapping[str, Tensor]) -> None:
    """Log the allow-list: what trains, with counts."""
    counts: dict[str, int] = {}
    for name, tensor in masters.items():
        kind = name.partition(".mlp.")[2]
        counts[kind] = counts.get(kind, 0) + tensor.numel()
    each = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    log.info("%s parameters train: %s", f"{sum(counts.values()):,}", each)


def make_feed(batches: StepBatches, models: Models, world: World) -> Feed:
    """The feed; it runs ahead where the teacher's work is not the student's device's.

    On one device two threads of torch only get into each other's way: a CPU's threads are taken
    up by both, which made a step a third slower.
    """
    teacher = models.teacher
    apart = isinstance(teacher, StoreTeacher) or (
        isinstance(teacher, ModelTeacher) and teacher.device != world.device
    )
    return Feed(batches, teacher, world.device, ahead=apart)


def loop_settings(request: Request, *, evaluates: bool) -> LoopSettings:
    """When the loop does what."""
    config, optimizer = request.config, request.config.optimizer
    return LoopSettings(
        max_steps=request.max_steps,
        clip_norm=optimizer.clip_norm,
        rates=peak_rates(optimizer),
        sources=request.sources,
        kd_weight=max(weights.kd for weights in request.weights),
        num_layers=request.shape.num_layers,
        evaluate_every=config.evaluation.every if evaluates else None,
        save_every=config.runtime.save_every,
        watch_every=config.runtime.watch_every,
        log_every=config.runtime.log_every,
        patience=config.evaluation.patience,
        explosion=config.runtime.explosion,
    )


def make_anchor(request: Request, models: Models) -> Anchor | None:
    """SFA's anchor at the weights as they are now, if the run uses it."""
    averaging = request.config.averaging
    if averaging.every is None:
        return None
    return Anchor(
        models.masters,
        beta=averaging.beta,
        every=averaging.every,
        kind=averaging.anchor,
        read=partial(read_master, models.optimizer),
        write=partial(write_master, models.optimizer),
    )


def make_save(
    request: Request,
    directory: Path,
    models: Models,
    anchor: Anchor | None,
    mine: Mapping[str, Any],
    world: World,
) -> Callable[[Progress], str]:
    """A function that writes a checkpoint of the run, called by all ranks together."""
    dtypes = _stored_dtypes(models.masters)

    def write_model(target: Path, _: Mapping[str, Tensor]) -> None:
        # Not the exact masters: a split one is in the model as bf16, and goes out as it is.
        tensors = {name: m.detach().to(dtypes[name]) for name, m in models.masters.items()}
        if request.config.runtime.adapter:
            write_adapter(target, request.student.path, tensors)
        else:
            write_model_directory(target, request.student.path, tensors)

    def save(progress: Progress) -> str:
        state = TrainingState(
            step=progress.step,
            tokens=progress.tokens,
            identity=dict(mine),
            masters=exact_masters(models.optimizer, models.masters) if world.is_main else {},
            moments=optimizer_moments(models.optimizer, models.masters),
            anchor=anchor.state_dict() if anchor is not None else {},
            rng=gather_rng(world),
        )
        if world.is_main:
            keep = request.config.runtime.keep_last
            try:
                save_checkpoint(directory, state, write_model, keep_last=keep)
            except (OSError, SafetensorError) as error:
                raise ResourceError(
                    f"cannot write checkpoint-{progress.step} into {directory}: {error}",
                    hint="free some disk space and give the same command: it goes on from the "
                    "checkpoint before",
                ) from error
        world.barrier()
        return f"checkpoint-{progress.step}"

    return save


def make_evaluate(
    models: Models, held_out: HeldOut | None, world: World
) -> Callable[[], dict[str, dict[str, float]]]:
    """A function that measures held-out text, called by all ranks together."""
    if held_out is None:
        return dict
    return lambda: evaluate(models.step, held_out, models.judge, world)


def make_keeper(
    request: Request,
    directory: Path,
    held_out: HeldOut | None,
    world: World,
    progress: Progress,
) -> BestKeeper | None:
    """Follows which checkpoint is best on held-out text, where there is some and it can tell."""
    evaluation, data = request.config.evaluation, request.config.data
    if held_out is None or not request.keeps_best:
        return None
    judged = {
        name: SourceWeights(w.ce, w.kd, w.router)
        for name, w in held_out_weights(request.config).items()
    }
    judge = sha256_json(
        {
            "sources": [[name, *asdict(weight).values()] for name, weight in judged.items()],
            "text": (evaluation.data or data).model_dump(mode="json", exclude={"data_dir"}),
            "sequences": evaluation.sequences,
        }
    )
    return BestKeeper(directory, judged, world, progress.step, judge[:12])


def _stored_dtypes(masters: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Formats in a model folder: bf16 as in the original checkpoints, the gates fp32."""
    return {
        name: torch.float32 if name.endswith("output_gate") else torch.bfloat16 for name in masters
    }


def _objective(request: Request) -> Objective:
    config, loss = request.config, request.config.loss
    trains = config.router_trains
    return Objective(
        sources=[SourceWeights(w.ce, w.kd, w.router) for w in request.weights],
        load_balance=_given(loss.load_balance, LOAD_BALANCE if trains else 0.0),
        router_z=_given(loss.router_z, ROUTER_Z if trains else 0.0),
        router_temperature=loss.router_temperature,
        top_k=request.shape.top_k,
        chunk_size=config.runtime.head_chunk,
        divergence=loss.divergence,
        jsd_beta=loss.jsd_beta,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _model_teacher(
    request: Request, student: nn.Module, dtype: torch.dtype, device: torch.device
) -> ModelTeacher:
    assert request.teacher is not None
    model = load_model(
        request.teacher.path,
        device=device,
        dtype=dtype,
        experts_backend=request.config.runtime.experts_backend,
    )
    wants_routers = any(weights.router > 0 for weights in request.weights)
    try:
        return ModelTeacher(model, student, router_logits=wants_routers)
    except ValueError as error:
        raise ArtifactError(
            f"{request.teacher.path} cannot teach {request.student.path}: {error}",
            hint="give the model that the student was converted from",
        ) from error
