"""What each optimizer step reads: micro-batches by step number, each with its teacher's signal."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.teacher import Teacher, TeacherSignal

# Shape letters in this file: N samples of the whole run, G sequences of one optimizer step.


class Blocks(Protocol):
    """A set of sequences that can be read in any order."""

    def __len__(self) -> int: ...

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        """The sequences ``index_B``, in that order, on the CPU."""
        ...


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of a step, as a pure function of its number.

    Step ``k`` of all ranks together is ``order_N[k * G : (k + 1) * G]`` with
    ``G = batch_size * accumulation * size``; so neither the split over ranks and micro-batches
    nor a resume changes what a step learns from, and the step number is the whole data position.

    Attributes:
        blocks: the sequences.
        order_N: which sequence each sample of the run is.
        batch_size: sequences a forward pass.
        accumulation: micro-batches a step, on each rank.
        rank: this process.
        size: how many processes there are.
    """

    blocks: Blocks
    order_N: NDArray[np.int64]
    batch_size: int
    accumulation: int
    rank: int = 0
    size: int = 1

    @property
    def per_step(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.batch_size * self.accumulation * self.size

    @property
    def num_steps(self) -> int:
        """Whole steps that the order lasts for."""
        return len(self.order_N) // self.per_step

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of step ``step`` (the first is 0).

        Raises:
            ValueError: the run has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} of {self.num_steps}")
        step_G = self.order_N[step * self.per_step : (step + 1) * self.per_step]
        parts = step_G.reshape(self.accumulation, self.size, self.batch_size)[:, self.rank]
        return [self.blocks.batch(index_B) for index_B in parts]


class Feed:
    """Gives a step's micro-batches on the device, each with its signal.

    With ``ahead``, a thread prepares the next pair while the student works on this one; that
    hides a teacher on its own device and the decoding of a store. The pairs are the same.

    Args:
        batches: what each step reads.
        teacher: ``None`` where the run is cross entropy alone.
        device: the student's.
        ahead: prepare one pair in advance.
    """

    def __init__(
        self,
        batches: StepBatches,
        teacher: Teacher | None,
        device: torch.device,
        *,
        ahead: bool = False,
    ) -> None:
        self.batches = batches
        self._teacher = teacher
        self._device = device
        self._read: dict[int, list[Batch]] = {}
        self._pool = ThreadPoolExecutor(1, "feed") if ahead else None
        self._pending: dict[tuple[int, int], Future[tuple[Batch, TeacherSignal | None]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of ``step``, on the CPU; read once."""
        if step not in self._read:
            self._read[step] = self.batches.micro_batches(step)
        return self._read[step]

    def pairs(self, step: int) -> Iterator[tuple[Batch, TeacherSignal | None]]:
        """Each micro-batch of ``step`` on the device, with the teacher's signal."""
        count = len(self.micro_batches(step))
        for place in range(count):
            pending = self._pending.pop((step, place), None)
            pair = pending.result() if pending else self._make(step, place)
            self._prepare(*((step, place + 1) if place + 1 < count else (step + 1, 0)))
            yield pair
        del self._read[step]

    def _make(self, step: int, place: int) -> tuple[Batch, TeacherSignal | None]:
        batch = self.micro_batches(step)[place].to(self._device)
        return batch, None if self._teacher is None else self._teacher.signal(batch)

    def _prepare(self, step: int, place: int) -> None:
        if self._pool is not None and step < self.batches.num_steps:
            self.micro_batches(step)  # here, so that the thread only looks it up
            self._pending[step, place] = self._pool.submit(self._make, step, place)
