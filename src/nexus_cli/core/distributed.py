"""The processes of a run: one, or as many as ``accelerate launch`` or ``torchrun`` started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from nexus_cli.errors import NexusError

ResultT = TypeVar("ResultT")

# The main rank reads and tokenises text alone while the others wait; by default they would give
# up after ten minutes. A rank that dies still takes the others down at once, by its launcher.
PATIENCE = timedelta(hours=12)


class DeviceError(ValueError):
    """The device that the user named is not on this machine."""


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.size == 1:
            return value
        held = [value]
        broadcast_object_list(held, from_process=0)
        return held[0]

    def from_main(self, make: Callable[[], ResultT]) -> ResultT:
        """What ``make`` gives at rank 0, on every rank; a :class:`NexusError` of it likewise.

        Ranks that only waited for a failed one would die of a lost connection, with a traceback
        that buries what was wrong.
        """
        outcome: tuple[ResultT | None, NexusError | None] = (None, None)
        if self.is_main:
            try:
                outcome = (make(), None)
            except NexusError as error:
                outcome = (None, error)
        made, failed = self.broadcast_object(outcome)
        if failed is not None:
            raise failed
        result: ResultT = made
        return result

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of the ranks."""
        return [value] if self.size == 1 else list(gather_object([value]))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add ``tensor`` up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def resolve_device(name: str, *, local_rank: int = 0) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that is there.

    Raises:
        DeviceError: the device is not there. There is no fallback to another.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    index = int(name.partition(":")[2] or local_rank)
    if index >= found:
        there = f"this machine has {found} CUDA device(s)" if found else "there is no CUDA device"
        raise DeviceError(f"device {name}: {there}")
    return torch.device("cuda", index)


def open_world(device: str = "auto") -> World:
    """Join the run that a launcher started, or be alone.

    Raises:
        DeviceError: ``device`` is not on this machine.
    """
    wanted = resolve_device(device)
    state = PartialState(cpu=wanted.type == "cpu", timeout=PATIENCE)
    here = resolve_device(
        wanted.type if state.num_processes > 1 else str(wanted),
        local_rank=state.local_process_index,
    )
    if here.type == "cuda":
        torch.cuda.set_device(here)
    return World(rank=state.process_index, size=state.num_processes, device=here)
