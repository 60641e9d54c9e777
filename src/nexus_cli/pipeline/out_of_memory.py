"""Out of memory, in the user's words and with the numbers."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nexus_cli.errors import ResourceError
from nexus_cli.pipeline.capacity import free_memory, gib

HOST_HINT = "end other programs, or lower runtime.num_processes and the batch"
_STATM = Path("/proc/self/statm")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_ASKED = re.compile(
    rf"(?:tried|unable) to allocate ([\d.]+) ?({'|'.join(_UNITS)})\b", re.IGNORECASE
)
_GPU = re.compile(r"\bGPU (\d+)\b")
_HOST = re.compile(r"DefaultCPUAllocator|cannot allocate memory|unable to mmap", re.IGNORECASE)
_DEVICE = re.compile(r"out of memory|CU(?:BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED", re.IGNORECASE)


@dataclass(frozen=True)
class Held:
    """Memory of a device, in bytes.

    Attributes:
        used: by this process's tensors; on a CPU all that the process has.
        reserved: by this process, what its allocator keeps for later included.
        free: for anybody.
        total: of the device.
    """

    used: int
    reserved: int
    free: int
    total: int

    @property
    def attainable(self) -> int:
        """What this process could have in all."""
        return self.reserved + self.free


@dataclass(frozen=True)
class Shortage:
    """What a failed allocation is known to have been.

    Attributes:
        device: that was full.
        asked: bytes; ``None`` where the message does not say.
        held: on that device when it failed; ``None`` where the device does not answer any more.
    """

    device: torch.device
    asked: int | None
    held: Held | None

    def describe(self) -> str:
        """The numbers, as the end of a sentence."""
        parts = [] if self.asked is None else [f"{gib(self.asked)} were asked for"]
        if self.held is not None:
            held = self.held
            inside = "" if held.used == held.reserved else f", {gib(held.used)} of it in tensors"
            parts += [
                f"{gib(held.free)} of {gib(held.total)} are free",
                f"this process holds {gib(held.reserved)}{inside}",
            ]
        return "; ".join(parts)


Hint = str | Callable[[Shortage], str]


@contextmanager
def memory_on(
    device: torch.device, hint: Hint, *, doing: Callable[[], str] | None = None
) -> Iterator[None]:
    """Run a block that may use up the memory of a device, or of the host.

    Args:
        device: that the block computes on.
        hint: what would help, or a function that works it out once it is asked for. It is of
            ``device``: a full host beside a GPU has a hint of its own.
        doing: what the block was at, such as ``in step 3``.

    Raises:
        ResourceError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        short = shortage(error, device)
        where = "" if doing is None else f" {doing()}"
        numbers = short.describe()
        if short.device.type == "cpu" != device.type:
            hint = HOST_HINT
        raise ResourceError(
            f"out of memory on {short.device}{where}{': ' if numbers else ''}{numbers}",
            hint=hint if isinstance(hint, str) else hint(short),
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's classes, and messages of libraries."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and bool(_HOST.search(text) or _DEVICE.search(text))


def shortage(error: BaseException, device: torch.device) -> Shortage:
    """The numbers behind an error.

    Args:
        error: one that :func:`is_out_of_memory` knows.
        device: taken where the message does not name another GPU or the host.
    """
    text = str(error)
    is_host = not isinstance(error, torch.OutOfMemoryError) and (
        not isinstance(error, RuntimeError) or bool(_HOST.search(text))
    )
    if is_host:
        device = torch.device("cpu")
    elif found := _GPU.search(text):
        device = torch.device("cuda", int(found[1]))
    return Shortage(device, asked_bytes(text), held_on(device))


def asked_bytes(message: str) -> int | None:
    """The size that an allocator or numpy says was asked for; ``None`` if it says none."""
    found = _ASKED.search(message)
    if found is None:
        return None
    units = {name.lower(): size for name, size in _UNITS.items()}
    return int(float(found[1]) * units[found[2].lower()])


def held_on(device: torch.device) -> Held | None:
    """Memory of ``device`` now; ``None`` if it does not answer."""
    if device.type != "cuda":
        page = os.sysconf("SC_PAGE_SIZE")
        resident = int(_STATM.read_text().split()[1]) * page if _STATM.exists() else 0
        total = os.sysconf("SC_PHYS_PAGES") * page
        return Held(resident, resident, free_memory(device), total)
    try:
        free, total = torch.cuda.mem_get_info(device)
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    except (RuntimeError, AssertionError):  # a broken context, or a torch without CUDA
        return None
    return Held(used, reserved, free, total)
