"""Which changes of a run would make it fit, each judged by the sums that plan runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nexus_cli.errors import ConfigError
from nexus_cli.pipeline.capacity import gib
from nexus_cli.pipeline.training.optimizer import require_exact_sums, splits
from nexus_cli.pipeline.training.request import Request

SHORTEST = 128  # tokens of a sequence that is still worth training on

Need = Callable[[Request], int]


@dataclass(frozen=True)
class Change:
    """A run that asks for less, and the flags that make it of the one before."""

    flags: str
    request: Request


def what_fits(request: Request, need: Need, room: int, *, beside: str = "") -> str:
    """Say which single change is enough, else which changes together.

    Args:
        request: a run that does not fit.
        need: least bytes that a run takes, in the same terms as ``room``.
        room: bytes that there are.
        beside: what is counted in neither of the two, such as ``" beside the weights"``.

    Returns:
        A hint: flags to type, with what each run would need at least.
    """
    if room <= 0:
        return f"the frozen weights alone take more than there is: {_elsewhere(request)}"
    fitting = [
        f"{change.flags} ({gib(need(change.request))})"
        for kind in (_smaller_batches, _shorter_sequences, _recomputation, _eight_bit)
        if (change := _first_that_fits(kind(request), need, room)) is not None
    ]
    if fitting:
        return f"would fit in {gib(room)}{beside}: {'; or '.join(fitting)}"
    steps = list(_all_together(request, need))
    enough = next((step for step in steps if need(step.request) <= room), None)
    if enough is not None:
        taken = gib(need(enough.request))
        return f"would fit in {gib(room)}{beside}, all together: {enough.flags} ({taken})"
    least = min(map(need, (request, *(step.request for step in steps))))
    return (
        "no smaller batch, shorter sequences, recomputation or 8-bit optimizer would fit in "
        f"{gib(room)}{beside}: the least is {gib(least)}; {_elsewhere(request)}"
    )


def _elsewhere(request: Request) -> str:
    """What is left to do about weights."""
    others = ["another --teacher-device"] if request.teacher is not None else []
    others += ["--experts-backend auto"] if request.config.runtime.experts_backend == "bf16" else []
    return ", or ".join(["use a device with more memory", *others])


def _first_that_fits(changes: Iterator[Change], need: Need, room: int) -> Change | None:
    return next((change for change in changes if need(change.request) <= room), None)


def _smaller_batches(request: Request) -> Iterator[Change]:
    """Largest first; the step keeps its sequences, so that an unfinished run can go on."""
    accumulation = request.config.gradient_accumulation_steps
    keeps_step = not (splits(request) and request.world_size > 1)
    for size in _divisors(request.batch_size)[1:]:
        flags, smaller = f"--batch-size {size}", replace(request, batch_size=size)
        if keeps_step:
            passes = accumulation * request.batch_size // size
            flags += f" --gradient-accumulation-steps {passes}"
            smaller = _configured(smaller, gradient_accumulation_steps=passes)
        yield Change(flags, smaller)


def _divisors(number: int) -> list[int]:
    """Largest first, the number itself included."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


def _shorter_sequences(request: Request) -> Iterator[Change]:
    """Halved and halved again; a store's sequences are as long as they are."""
    data, length = request.config.data, request.seq_len // 2
    while request.store is None and length >= SHORTEST:
        shorter = data.model_copy(update={"seq_len": length})
        yield Change(f"--set data.seq_len={length}", _configured(request, data=shorter))
        length //= 2


def _recomputation(request: Request) -> Iterator[Change]:
    runtime = request.config.runtime
    if not runtime.gradient_checkpointing:
        runtime = runtime.model_copy(update={"gradient_checkpointing": True})
        yield Change(
            "--set runtime.gradient_checkpointing=true", _configured(request, runtime=runtime)
        )


def _eight_bit(request: Request) -> Iterator[Change]:
    if splits(request):
        return
    optimizer = request.config.optimizer.model_copy(update={"kind": "adamw-8bit"})
    changed = _configured(request, optimizer=optimizer)
    try:
        require_exact_sums(changed)
    except ConfigError:
        return  # it would be refused
    yield Change("--optimizer adamw-8bit", changed)


def _all_together(request: Request, need: Need) -> Iterator[Change]:
    """One change on top of the other, as far as each saves something; lengths come last."""
    flags: list[str] = []
    for kind in (_eight_bit, _recomputation, _smaller_batches, _shorter_sequences):
        last = ""
        for change in list(kind(request)):
            if need(change.request) < need(request):
                request, last = change.request, change.flags
                yield Change(" ".join([*flags, last]), request)
        flags += [last] if last else []


def _configured(request: Request, **changes: Any) -> Request:
    update: Mapping[str, Any] = changes
    return replace(request, config=request.config.model_copy(update=update))
