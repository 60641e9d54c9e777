"""Times by CUDA events, peak memory, and the one JSON line that every benchmark ends with."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

GIB = 2**30
# The device idles this long while the host queues all repeats, so that what is timed is the
# device's work and not Python's. About 20 ms on a card of 1.7 GHz.
SLEEP_CYCLES = 35_000_000

Mark = torch.cuda.Event | float


def mark(device: torch.device) -> Mark:
    """This point of the device's queue; on a CPU, of time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(start: Mark, end: Mark) -> float:
    """Milliseconds between two marks; the device must have passed both."""
    if isinstance(start, float) or isinstance(end, float):
        return 1e3 * (float(end) - float(start))  # type: ignore[arg-type]
    return start.elapsed_time(end)


def finish(device: torch.device) -> None:
    """Wait until the device has done all that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def intervals_ms(marks: Sequence[Mark]) -> list[float]:
    """Between each mark and the next."""
    return [elapsed_ms(a, b) for a, b in pairwise(marks)]


def median_ms(
    call: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    warm_up: int = 3,
    hide_launch: bool = False,
) -> float:
    """The median time of one call, of ``repeats`` queued without a wait between them.

    Args:
        call: what to time; its result is dropped at once.
        device: that it runs on.
        repeats: calls that count.
        warm_up: calls before those.
        hide_launch: let the host run ahead, for work shorter than its launches. The whole step
            is timed without: there the launches are a part of what a user waits for.
    """
    for _ in range(warm_up):
        call()
    finish(device)
    if hide_launch and device.type == "cuda":
        torch.cuda._sleep(SLEEP_CYCLES)
    marks = [mark(device)]
    for _ in range(repeats):
        call()
        marks.append(mark(device))
    finish(device)
    return statistics.median(intervals_ms(marks))


def forget_peak(device: torch.device) -> None:
    """Start measuring peak memory anew."""
    finish(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocated_gib(device: torch.device) -> float:
    """Memory of the tensors that exist now."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def peak_gib(device: torch.device) -> dict[str, float]:
    """Most memory that tensors took, and most that the allocator held."""
    if device.type != "cuda":
        return {"peak_gib": 0.0, "reserved_gib": 0.0}
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def emit(result: Mapping[str, Any]) -> None:
    """Print one JSON object as a line of its own, figures with five digits."""
    print(json.dumps(rounded(result)), flush=True)


def rounded(value: Any) -> Any:
    """The same value with every float cut to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
