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

    With ``ahead``, a thread reads the next step's text and prepares the next pair while the
    student works on this one; that hides a teacher on its own device and the decoding of a store.
    The pairs are the same.

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
        self._reading: dict[int, Future[list[Batch]]] = {}
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
            reading = self._reading.pop(step, None)
            self._read[step] = reading.result() if reading else self.batches.micro_batches(step)
        return self._read[step]

    def pairs(self, step: int) -> Iterator[tuple[Batch, TeacherSignal | None]]:
        """Each micro-batch of ``step`` on the device, with the teacher's signal."""
        batches = self.micro_batches(step)
        for place, batch in enumerate(batches):
            pending = self._pending.pop((step, place), None)
            pair = pending.result() if pending else self._make(batch)
            if place + 1 < len(batches):
                self._prepare(step, place + 1, batches[place + 1])
            else:
                self._prepare_step(step + 1)
            yield pair
        del self._read[step]

    def _make(self, batch: Batch) -> tuple[Batch, TeacherSignal | None]:
        here = batch.to(self._device)
        return here, None if self._teacher is None else self._teacher.signal(here)

    def _prepare(self, step: int, place: int, batch: Batch) -> None:
        if self._pool is not None:
            self._pending[step, place] = self._pool.submit(self._make, batch)

    def _prepare_step(self, step: int) -> None:
        """Read the text of a step, and make its first pair of it."""
        if self._pool is None or step >= self.batches.num_steps:
            return
        reading = self._pool.submit(self.batches.micro_batches, step)
        self._reading[step] = reading
        # After it on the same thread, so that it is there.
        first = self._pool.submit(lambda: self._make(reading.result()[0]))
        self._pending[step, 0] = first
