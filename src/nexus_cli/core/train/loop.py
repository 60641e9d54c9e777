"""The training loop, and the only one: online and offline runs differ in what they give it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nexus_cli.core.distill.anchor import Anchor
from nexus_cli.core.distill.schedule import Schedule, ScheduleValues
from nexus_cli.core.distributed import World
from nexus_cli.core.train.feed import Feed
from nexus_cli.core.train.optim import Rates, clip_gradients, set_rates
from nexus_cli.core.train.ranks import StepCounts, agree
from nexus_cli.core.train.record import (
    Stopwatch,
    add_sums,
    gate_mean_abs,
    log_line,
    loss_metrics,
    memory_gib,
    reduce_sums,
)
from nexus_cli.core.train.signals import StopRequest
from nexus_cli.core.train.step import StepScale

log = logging.getLogger(__name__)


class NotFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite; nothing was updated with it."""


class Recorder(Protocol):
    """Where metrics records go."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        ...


@dataclass
class Progress:
    """How far a run is: the step number is also its position in the data."""

    step: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class LoopSettings:
    """When the loop does what.

    Attributes:
        max_steps: optimizer steps of the whole run.
        clip_norm: largest norm of a step's gradient.
        rates: peak learning rates.
        sources: names of the data sources.
        kd_weight: the largest ``w_kd`` of any source, for the record.
        num_layers: of the model.
        evaluate_every: steps between evaluations; ``None`` for never.
        save_every: steps between checkpoints; ``None`` for the last one only.
        watch_every: steps between measurements of routing, agreement and teacher entropy.
        log_every: steps between log lines; every step is in the metrics.
    """

    max_steps: int
    clip_norm: float
    rates: Rates
    sources: Sequence[str]
    kd_weight: float
    num_layers: int
    evaluate_every: int | None = None
    save_every: int | None = None
    watch_every: int = 10
    log_every: int = 10


@dataclass
class Parts:
    """What a loop drives; it builds none of them.

    Attributes:
        module: the :class:`DistillationStep`, or DDP around it.
        masters: the fp32 parameters that train, by name.
        optimizer: over the masters.
        schedule: values of every step.
        feed: micro-batches and signals.
        world: this process among its peers.
        recorder: metrics; ``None`` on all ranks but the main one.
        save: writes a checkpoint of the progress given, on all ranks together; its path.
        evaluate: measures held-out text, on all ranks together.
        stop: signals received.
        anchor: weight averaging, or ``None``.
    """

    module: nn.Module
    masters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    feed: Feed
    world: World
    recorder: Recorder | None
    save: Callable[[Progress], str]
    evaluate: Callable[[], dict[str, dict[str, float]]]
    stop: StopRequest
    anchor: Anchor | None = None


class Loop:
    """Takes optimizer steps from where ``progress`` stands until the end or a signal."""

    def __init__(self, parts: Parts, settings: LoopSettings, progress: Progress) -> None:
        self.parts = parts
        self.settings = settings
        self.progress = progress
        self._watch = Stopwatch()
        self._saved_at = progress.step

    def run(self) -> int:
        """Train.

        Returns:
            0 at the end of the run; otherwise the number of the signal that stopped it, after
            a checkpoint was saved.

        Raises:
            NotFiniteError: a loss or gradient is not finite; the weights are those of the step
                before, and no checkpoint is written.
        """
        if self.progress.step == 0 and self.settings.evaluate_every:
            self._evaluate()
        self._watch = Stopwatch()
        while self.progress.step < self.settings.max_steps:
            batches = self.parts.feed.micro_batches(self.progress.step)
            counts = agree(batches, self.parts.stop.received, self.parts.world)
            if counts.stop_signal:
                self._save()
                return counts.stop_signal
            self._step(counts)
        self._save()
        self._write({"event": "finish", "tokens": self.progress.tokens})
        return 0

    def _step(self, counts: StepCounts) -> None:
        """One optimizer step, its record, and what falls due after it."""
        values = self.parts.schedule.at(self.progress.step)
        rates = scaled_rates(self.settings.rates, values)
        set_rates(self.parts.optimizer, rates)
        sums = reduce_sums(self._backward(counts, values), self.parts.world)
        norm = float(clip_gradients(self.parts.optimizer, self.settings.clip_norm))
        self._require_finite(float(sums["loss"]), norm)
        self.parts.optimizer.step()
        self.progress.step += 1
        self.progress.tokens += counts.tokens
        self._record(counts, values, rates, sums, norm)
        self._merge()
        last = self.progress.step == self.settings.max_steps
        if self.settings.evaluate_every and (last or self._due(self.settings.evaluate_every)):
            self._evaluate()
        if self.settings.save_every and self._due(self.settings.save_every):
            self._save()

    def _backward(self, counts: StepCounts, values: ScheduleValues) -> dict[str, Tensor]:
        """Forward and backward of all micro-batches; the ranks' gradients meet in the last."""
        step = self.progress.step
        scale = StepScale(
            tokens=counts.tokens,
            sequences=counts.sequences,
            temperature=values.temperature,
            kd_scale=values.kd_scale,
            watch=step == 0 or (step + 1) % self.settings.watch_every == 0,
        )
        self.parts.optimizer.zero_grad(set_to_none=True)
        count = len(self.parts.feed.micro_batches(step))
        sums: dict[str, Tensor] = {}
        self._read: list[tuple[Tensor, Tensor]] = []
        for place, (batch, signal) in enumerate(self.parts.feed.pairs(step), start=1):
            with self._exchange(is_last=place == count):
                output = self.parts.module(batch, signal, scale)
                output.loss.backward()
            self._read.append((batch.index_B, output.sums["loss"]))
            add_sums(sums, output.sums)
        return sums

    def _exchange(self, *, is_last: bool) -> AbstractContextManager[object]:
        if is_last or not isinstance(self.parts.module, DistributedDataParallel):
            return nullcontext()
        held: AbstractContextManager[object] = self.parts.module.no_sync()
        return held

    def _require_finite(self, loss: float, norm: float) -> None:
        """Stop before a broken number reaches the weights; every rank sees the same sums."""
        if torch.isfinite(torch.tensor([loss, norm])).all():
            return
        mine = [index_B.tolist() for index_B, value in self._read if not value.isfinite()]
        bad = [index for part in self.parts.world.gather_objects(mine) for index in part]
        what = f"the loss is {loss}" if bad else f"the gradient's norm is {norm}"
        where = f", from the batch of sequences {bad[0]}" if bad else ""
        raise NotFiniteError(f"{what} in step {self.progress.step + 1}{where}")

    def _record(
        self,
        counts: StepCounts,
        values: ScheduleValues,
        rates: Rates,
        sums: dict[str, Tensor],
        norm: float,
    ) -> None:
        batches = self.parts.feed.batches
        record = {
            "epoch": round(self.progress.step * batches.per_step / len(batches.blocks), 6),
            "tokens": self.progress.tokens,
            **loss_metrics(sums, self.settings.sources, self.settings.num_layers),
            "grad_norm": norm,
            "clipped": norm > self.settings.clip_norm,
            "learning_rate": rates.shared,
            "gate_learning_rate": rates.gate,
            "temperature": values.temperature,
            "kd_weight": values.kd_scale * self.settings.kd_weight,
            "tokens_per_second": self._watch.rate(counts.positions),
            "memory_gib": memory_gib(self.parts.world.device),
            "gate_mean_abs": gate_mean_abs(self.parts.masters),
        }
        self._write(record)
        if self.progress.step == 1 or self._due(self.settings.log_every):
            log.info(log_line({"step": self.progress.step, **record}, self.settings.max_steps))

    def _merge(self) -> None:
        anchor = self.parts.anchor
        if anchor is not None and anchor.due(self.progress.step):
            move = anchor.merge(self.parts.masters)
            self._write({"event": "sfa", "l2": move.l2, "max": move.max})

    def _evaluate(self) -> None:
        results = self.parts.evaluate()
        if results:
            self._write({"eval": results})
            for name, values in results.items():
                shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
                log.info("held-out %s at step %d: %s", name, self.progress.step, shown)
        self._watch = Stopwatch()

    def _save(self) -> None:
        """Save, unless this very step is saved already."""
        if self._saved_at == self.progress.step:
            return
        path = self.parts.save(self.progress)
        self._saved_at = self.progress.step
        self._write({"event": "checkpoint", "path": path})
        log.info("saved %s", path)
        self._watch = Stopwatch()

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.parts.recorder is not None:
            self.parts.recorder.write({"step": self.progress.step, **record})


def scaled_rates(peak: Rates, values: ScheduleValues) -> Rates:
    """The learning rates of a step; router biases have a factor of their own, 0 once frozen."""
    scale = values.lr_scale
    return Rates(
        shared=peak.shared * scale,
        gate=peak.gate * scale,
        router=peak.router * scale,
        router_bias=peak.router_bias * scale * values.router_bias_scale,
    )
