"""Stages ``train`` and ``train-offline``: one run, with a teacher in memory or in a store."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker

from nexus_cli.config.train import TrainConfig
from nexus_cli.core import distributed
from nexus_cli.core.distill.anchor import Anchor
from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.export import NEXUS_SHARD
from nexus_cli.core.train.best import Best, BestKeeper
from nexus_cli.core.train.checkpoints import Checkpoint
from nexus_cli.core.train.determinism import make_deterministic
from nexus_cli.core.train.diagnosis import diagnose
from nexus_cli.core.train.guard import LossError
from nexus_cli.core.train.loop import Loop, Parts, Progress, Recorder
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.core.train.ranks import wrap_for_ranks
from nexus_cli.core.train.signals import StopRequest
from nexus_cli.core.train.state import restore, restore_rng
from nexus_cli.errors import ArtifactError, Interrupted, ResourceError
from nexus_cli.io import adapter_dir, console, manifest, model_dir
from nexus_cli.io.metrics import FILENAME, MetricsWriter, read_metrics
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.stage import StageOutput, stage
from nexus_cli.pipeline.training import assemble, plan
from nexus_cli.pipeline.training.request import Request, offline_request, online_request
from nexus_cli.pipeline.training.resume import choose_start, identity, load_start
from nexus_cli.pipeline.training.shortage import memory_of_run
from nexus_cli.pipeline.training.text import held_out_text, training_batches
from nexus_cli.pipeline.training.trackers import Reporter, open_trackers, require_trackers
from nexus_cli.pipeline.world import open_world

log = logging.getLogger(__name__)

LOG = "training.log"
MODEL_FILES = ("config.json", model_dir.INDEX, NEXUS_SHARD)
ADAPTER_FILES = (model_dir.ADAPTER, adapter_dir.TENSORS)

Prepare = Callable[[TrainConfig, Workspace, int], Request]


def run_online(
    config: TrainConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Train with the teacher in memory: the student itself, or a model of its own.

    Raises:
        NexusError: see :func:`~nexus_cli.pipeline.training.request.online_request`;
            Interrupted after a signal, once a checkpoint is written.
    """
    _run(online_request, config, workspace, force=force, dry_run=dry_run)


def run_offline(
    config: TrainConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Train from a teacher store, which holds the text too.

    Raises:
        NexusError: see :func:`~nexus_cli.pipeline.training.request.offline_request`;
            Interrupted after a signal, once a checkpoint is written.
    """
    _run(offline_request, config, workspace, force=force, dry_run=dry_run)


def _run(
    prepare: Prepare, config: TrainConfig, workspace: Workspace, *, force: bool, dry_run: bool
) -> None:
    console.configure()
    torch.manual_seed(config.data.seed)  # a GPU's generator starts from a random seed
    if config.runtime.deterministic:
        make_deterministic()
    world = open_world(config.runtime.device)
    teacher_device = _teacher_device(config, world)
    require_trackers(config.runtime.report_to, world)
    request = prepare(config, workspace, world.size)
    if dry_run:
        directory = config.output or workspace.stage_dir(request.command)
        plan.describe(request, directory, world.device, teacher_device)
        return
    with stage(
        request.command,
        config,
        workspace,
        main="",
        inputs=request.inputs,
        output=config.output,
        world=world,
        force=force,
        whole_directory=True,
    ) as out:
        if out is None:
            return
        _train(request, workspace, world, teacher_device, out, force=force)


def _train(
    request: Request,
    workspace: Workspace,
    world: World,
    teacher_device: torch.device,
    out: StageOutput,
    *,
    force: bool,
) -> None:
    """Everything between an open stage and its record."""
    with ExitStack() as log_file:  # to the end: it is told the result too
        progress, keeper = _all_steps(
            request, workspace, world, teacher_device, out.directory, log_file, force=force
        )
        wants_best = request.config.evaluation.patience is not None
        _commit(out, progress, keeper.best if keeper and wants_best else None, world)
        if world.is_main:
            replay = keeper.replay if keeper is not None else []
            for sentence in diagnose(read_metrics(out.directory), replay):
                log.info("%s", sentence)


def _all_steps(
    request: Request,
    workspace: Workspace,
    world: World,
    teacher_device: torch.device,
    directory: Path,
    log_file: ExitStack,
    *,
    force: bool,
) -> tuple[Progress, BestKeeper | None]:
    """Train to the end; where the run stands then, and who followed its evaluations."""
    with ExitStack() as held:
        stop = held.enter_context(StopRequest())
        batches, digest = training_batches(request, workspace, world)
        mine = identity(request, digest, frozen_dtype(request.config.dtype, world.device))
        start = _agree_on_start(request, directory, mine, world, force=force)
        if world.is_main:
            log_file.callback(_close, _open_log(directory, is_new=start is None))
        log.info("%s", plan.steps_sentence(request))
        trackers = held.enter_context(_trackers(request, directory, start, world))
        with memory_of_run(request, world.device, teacher_device):
            models = assemble.load_models(request, world, teacher_device)
        anchor = assemble.make_anchor(request, models)
        progress = _restored(start, models, anchor, world)
        held_out = held_out_text(request, workspace, world)
        recorder: Recorder | None = None
        if world.is_main:
            kept = progress.step if start else None
            writer = held.enter_context(MetricsWriter(directory / FILENAME, kept))
            recorder = Reporter(writer, trackers)
            recorder.write(_start_record(request, progress, mine, world))
        parts = Parts(
            module=wrap_for_ranks(models.step, world),
            masters=models.masters,
            optimizer=models.optimizer,
            schedule=request.schedule,
            feed=held.enter_context(assemble.make_feed(batches, models, world)),
            world=world,
            recorder=recorder,
            save=assemble.make_save(request, directory, models, anchor, mine, world),
            evaluate=assemble.make_evaluate(models, held_out, world),
            stop=stop,
            anchor=anchor,
            keeper=assemble.make_keeper(request, directory, held_out, world, progress),
            losses=world.from_main(lambda: _losses(directory, progress.step)),
            show=held.enter_context(console.live_line()),
        )
        settings = assemble.loop_settings(request, evaluates=held_out is not None)
        with memory_of_run(request, world.device, teacher_device, step=lambda: progress.step + 1):
            received = _take_steps(Loop(parts, settings, progress), directory)
    if received:
        raise _interrupted(received, progress, request, directory)
    return progress, parts.keeper


def _trackers(
    request: Request, directory: Path, start: Checkpoint | None, world: World
) -> AbstractContextManager[list[GeneralTracker]]:
    """What ``--report-to`` names; before the models, which take minutes to load."""
    return open_trackers(
        request.config.runtime.report_to,
        directory,
        request.config.model_dump(mode="json"),
        0 if start is None else start.step,
        world,
    )


def _losses(directory: Path, step: int) -> list[float]:
    """Losses of the steps before ``step``, where a run goes on."""
    if not step or not (directory / FILENAME).is_file():
        return []
    return [r["loss"] for r in read_metrics(directory) if r.get("loss") and r["step"] <= step]


def _restored(
    start: Checkpoint | None, models: assemble.Models, anchor: Anchor | None, world: World
) -> Progress:
    """Where the run stands, with everything put back that a checkpoint holds."""
    if start is None:
        return Progress()
    state = load_start(start)
    restore(state, models.masters, models.optimizer)
    if anchor is not None:
        try:
            anchor.load_state_dict(state.anchor)
        except ValueError as error:
            raise ArtifactError(f"{start.path}: {error}") from error
    restore_rng(state.rng, world)
    return Progress(state.step, state.tokens)


def _take_steps(loop: Loop, directory: Path) -> int:
    """Run the loop; what goes wrong inside it, in the user's words."""
    try:
        return loop.run()
    except LossError as error:
        raise ArtifactError(
            f"{error}; {error.kept}",
            hint="lower --learning-rate, or look at that text; the checkpoints before it are "
            f"in {directory}",
        ) from error


def _teacher_device(config: TrainConfig, world: World) -> torch.device:
    """The teacher's device, asked for before anything is loaded."""
    name = config.runtime.teacher_device
    if name is None:
        return world.device
    try:
        return distributed.resolve_device(name)
    except distributed.DeviceError as error:
        raise ResourceError(f"teacher: {error}", hint="name another --teacher-device") from error


def _agree_on_start(
    request: Request, directory: Path, mine: Mapping[str, Any], world: World, *, force: bool
) -> Checkpoint | None:
    """The main rank chooses, since it may have to clear the folder; all ranks learn of it."""
    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
    return world.from_main(
        lambda: choose_start(directory, request.config.runtime.resume, mine, force=force)
    )


def _start_record(
    request: Request, progress: Progress, mine: Mapping[str, Any], world: World
) -> dict[str, Any]:
    return {
        "step": progress.step,
        "event": "resume" if progress.step else "start",
        "command": request.command,
        "max_steps": request.max_steps,
        "world_size": world.size,
        "batch_size": request.batch_size,
        "gradient_accumulation_steps": request.config.gradient_accumulation_steps,
        "seq_len": request.seq_len,
        "device": str(world.device),
        "dtype": mine["dtype"],
        "student": str(request.student.path),
        "sources": {
            name: {"ce": weights.ce, "kd": weights.kd, "router": weights.router}
            for name, weights in zip(request.sources, request.weights, strict=True)
        },
        "environment": manifest.environment(),
    }


def _interrupted(
    received: int, progress: Progress, request: Request, directory: Path
) -> Interrupted:
    """The end of a run that a signal stopped, with the exit code that shells expect."""
    saved = f"checkpoint-{progress.step} is saved" if progress.step else "no step was taken"
    error = Interrupted(
        f"{signal.Signals(received).name} after step {progress.step} of {request.max_steps}: "
        f"{saved} in {directory}",
        hint=f"give the same command again to go on: {manifest.command_line()}",
    )
    error.exit_code = 128 + received
    return error


def _commit(out: StageOutput, progress: Progress, best: Best | None, world: World) -> None:
    """Name the run's outputs; later stages read the checkpoint that is named here."""
    step, note = _result(out.directory, progress, best, world)
    out.main = out.directory / f"checkpoint-{step}"
    if world.is_main:
        out.add(out.directory / FILENAME, format="nexus.metrics/1")
        # By what lies there: a run that goes on may have its last checkpoint in the other form.
        is_adapter = model_dir.is_adapter(out.main)
        format = adapter_dir.FORMAT if is_adapter else "nexus.model/1"
        for name in ADAPTER_FILES if is_adapter else MODEL_FILES:
            out.add(out.main / name, format=format)
    console.result(f"{out.main}: trained for {step} steps{note}")


def _result(
    directory: Path, progress: Progress, best: Best | None, world: World
) -> tuple[int, str]:
    """The step of the checkpoint that a run results in, and what there is to say of it.

    It is the last one, or the best for whoever asked for an early end.

    Args:
        directory: the run's folder.
        progress: at the end.
        best: the best evaluation, if its checkpoint is to be the result.
        world: the main rank warns where that checkpoint is not there.
    """
    if best is None or best.step == progress.step:
        return progress.step, ""
    path = directory / f"checkpoint-{best.step}"
    if path.is_dir():
        return best.step, f", the best of {progress.step}"
    if best.step:
        why = f"the best on held-out text, {path}, is missing"
    else:
        why = "no evaluation was better than the start"
    if world.is_main:
        log.warning("%s: the result is the last checkpoint, at step %d", why, progress.step)
    return progress.step, f", the last; {why}"


def _open_log(directory: Path, *, is_new: bool) -> logging.Handler:
    """``training.log``; a resumed run goes on in it."""
    if is_new:
        (directory / LOG).unlink(missing_ok=True)
    return console.log_to_file(directory / LOG)


def _close(handler: logging.Handler) -> None:
    logging.getLogger("nexus_cli").removeHandler(handler)
    handler.close()
