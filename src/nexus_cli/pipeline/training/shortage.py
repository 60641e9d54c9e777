"""What to change about a run that went out of memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.io import tensor_files
from nexus_cli.pipeline.capacity import gib
from nexus_cli.pipeline.model_memory import Placement
from nexus_cli.pipeline.out_of_memory import HOST_HINT, Shortage, memory_on
from nexus_cli.pipeline.training import plan
from nexus_cli.pipeline.training.fitting import Need, what_fits
from nexus_cli.pipeline.training.memory import SPARE
from nexus_cli.pipeline.training.request import Request

GENERAL = "lower --batch-size or --set data.seq_len, or use --optimizer adamw-8bit"


def memory_of_run(
    request: Request,
    device: torch.device,
    teacher_device: torch.device,
    *,
    step: Callable[[], int] | None = None,
) -> AbstractContextManager[None]:
    """Run a part of a training that may use up memory.

    Args:
        request: the run.
        device: the student's.
        teacher_device: of a teacher model, if there is one.
        step: number of the optimizer step that is being made; ``None`` while models are loaded.

    Returns:
        A context that raises ResourceError for what ran out.
    """
    return memory_on(
        device,
        lambda short: training_hint(
            request, device, teacher_device, short, is_planned=step is not None
        ),
        doing=(lambda: "while loading") if step is None else (lambda: f"in step {step()}"),
    )


def training_hint(
    request: Request,
    device: torch.device,
    teacher_device: torch.device,
    short: Shortage,
    *,
    is_planned: bool,
) -> str:
    """Which changes would fit, by the sums of the dry run.

    Args:
        request: the run.
        device: the student's.
        teacher_device: the teacher's.
        short: what was missing.
        is_planned: whether the run had spent the device's memory by its plan: then a smaller run
            would spend as much, and must be told to leave some.
    """
    if short.device != device:
        is_teachers = short.device == teacher_device and request.teacher is not None
        return f"{GENERAL}, or name another --teacher-device" if is_teachers else HOST_HINT
    if short.held is None:
        return GENERAL
    need = _need(request, device, beside=teacher_device == device)
    dtype = frozen_dtype(request.config.dtype, device)
    if is_planned and Placement(device, dtype).has_engine:
        return _plan_for_less(request, need, short.held.attainable, short.asked or 0)
    room = short.held.attainable
    missed = max(0, short.held.used + (short.asked or 0) - need(request))
    return what_fits(request, lambda changed: need(changed) + missed, room)


def _need(request: Request, device: torch.device, *, beside: bool) -> Need:
    tensors = tensor_files.tensors(request.student.path)
    sizes = plan.trained_sizes(
        tensors,
        train_router=request.config.whole_router_trains,
        train_router_bias=request.config.train_router_bias,
    )
    return lambda changed: plan.least_memory(changed, tensors, sizes, device, teacher_beside=beside)


def _plan_for_less(request: Request, need: Need, attainable: int, asked: int) -> str:
    """The engine keeps what fits, so it can keep less; what was asked for must find room."""
    bound = request.config.runtime.memory_gib
    room = attainable if bound is None else min(attainable, int(bound * 2**30))
    limit = math.floor(10 * (room - asked - SPARE) / 2**30) / 10
    if limit <= 0:
        return what_fits(request, need, room)
    budget, flag = int(limit * 2**30), f"--set runtime.memory_gib={limit:g}"
    others = what_fits(request, need, budget)
    more = "and make the run smaller"
    if need(request) <= budget:
        more = f"for which {gib(need(request))} are enough; if that fails, make the run smaller too"
    return f"add {flag}, so that less is kept, {more}: {others}"
