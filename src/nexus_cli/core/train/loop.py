"""The training loop, and the only one: online and offline runs differ in what they give it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.anchor import Anchor
from nexus_cli.core.distill.schedule import Schedule, ScheduleValues
from nexus_cli.core.distill.teacher import TeacherSignal
from nexus_cli.core.distributed import World
from nexus_cli.core.train.best import BestKeeper
from nexus_cli.core.train.estimate import Forecast
from nexus_cli.core.train.feed import Feed
from nexus_cli.core.train.guard import LossError, LossGuard
from nexus_cli.core.train.optim import Rates, clip_gradients, set_rates
from nexus_cli.core.train.ranks import StepCounts, agree
from nexus_cli.core.train.record import (
    add_sums,
    gate_mean_abs,
    log_line,
    loss_metrics,
    memory_gib,
    reduce_sums,
)
from nexus_cli.core.train.signals import StopRequest
from nexus_cli.core.train.step import StepScale
from nexus_cli.core.train.timing import PhaseClock, Stopwatch

log = logging.getLogger(__name__)


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
        patience: evaluations without improvement after which the run ends; ``None`` for never.
        explosion: nats above the usual loss that a step may have; ``None`` for any.
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
    patience: int | None = None
    explosion: float | None = None


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
        keeper: of the best checkpoint, or ``None``.
        losses: of the steps before a resume, the last ones.
        show: puts a line of text in place of the last one, where somebody watches.
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
    keeper: BestKeeper | None = None
    losses: Sequence[float] = ()
    show: Callable[[str], None] = lambda _: None


class Loop:
    """Takes optimizer steps from where ``progress`` stands until the end or a signal."""

    def __init__(self, parts: Parts, settings: LoopSettings, progress: Progress) -> None:
        self.parts = parts
        self.settings = settings
        self.progress = progress
        self._watch = Stopwatch()
        self._clock = PhaseClock(parts.world.device)
        self._guard = LossGuard(settings.explosion)
        self._guard.remember(parts.losses)
        self._saved_at = progress.step
        self._ends_early = False
        self._forecast = Forecast(
            settings.max_steps,
            evaluate_every=settings.evaluate_every,
            save_every=settings.save_every,
            keeps_best=parts.keeper is not None,
        )

    def run(self) -> int:
        """Train.

        Returns:
            0 at the end of the run; otherwise the number of the signal that stopped it, after
            a checkpoint was saved.

        Raises:
            LossError: a loss or gradient is not finite, or the loss explodes; the step's gradient
                was not applied, and no checkpoint is written.
        """
        if self.progress.step == 0 and self.settings.evaluate_every:
            self._evaluate()
        self._ends_early = self._is_out_of_patience()  # killed after an early end
        self._watch = Stopwatch()
        while self.progress.step < self.settings.max_steps and not self._ends_early:
            with self._forecast.measure("steps"):
                self._clock.start(waits=self._watches)
                with self._clock.phase("data"):
                    batches = self.parts.feed.micro_batches(self.progress.step)
                counts = agree(batches, self.parts.stop.received, self.parts.world)
                if not counts.stop_signal:
                    self._step(counts)
            if counts.stop_signal:
                self._save()
                return counts.stop_signal
            self._do_what_is_due()
        self._save()
        best = self.parts.keeper.best if self.parts.keeper is not None else None
        self._write(
            {
                "event": "finish",
                "tokens": self.progress.tokens,
                "ended_early": self._ends_early,
                "best_step": None if best is None else best.step,
            }
        )
        return 0

    @property
    def _watches(self) -> bool:
        """Whether the coming step measures what costs extra."""
        step = self.progress.step
        return step == 0 or (step + 1) % self.settings.watch_every == 0

    def _step(self, counts: StepCounts) -> None:
        """One optimizer step and its record."""
        values = self.parts.schedule.at(self.progress.step)
        rates = scaled_rates(self.settings.rates, values)
        set_rates(self.parts.optimizer, rates)
        sums = reduce_sums(self._backward(counts, values), self.parts.world)
        with self._clock.phase("optimizer"):
            norm = float(clip_gradients(self.parts.optimizer, self.settings.clip_norm))
        self._check(float(sums["loss"]), norm)
        with self._clock.phase("optimizer"):
            self.parts.optimizer.step()
        self.progress.step += 1
        self.progress.tokens += counts.tokens
        self._record(counts, values, rates, sums, norm)
        self._merge()

    def _do_what_is_due(self) -> None:
        """Evaluations and checkpoints after a step."""
        last = self.progress.step == self.settings.max_steps
        if self.settings.evaluate_every and (last or self._due(self.settings.evaluate_every)):
            self._evaluate()
        if self.settings.save_every and self._due(self.settings.save_every):
            if self._guard.alarmed:
                log.warning("step %d is not saved: its loss is unusual", self.progress.step)
            else:
                self._save()
        if (said := self._forecast.said(self.progress.step)) is not None:
            log.info("%s", said)

    def _backward(self, counts: StepCounts, values: ScheduleValues) -> dict[str, Tensor]:
        """Forward and backward of all micro-batches; the ranks' gradients meet in the last."""
        step = self.progress.step
        scale = StepScale(
            tokens=counts.tokens,
            sequences=counts.sequences,
            temperature=values.temperature,
            kd_scale=values.kd_scale,
            watch=self._watches,
        )
        self.parts.optimizer.zero_grad(set_to_none=True)
        count = len(self.parts.feed.micro_batches(step))
        sums: dict[str, Tensor] = {}
        self._read: list[tuple[Tensor, Tensor]] = []
        for place, (batch, signal) in enumerate(self._pairs(step), start=1):
            with self._exchange(is_last=place == count):
                with self._clock.phase("forward"):
                    output = self.parts.module(batch, signal, scale)
                with self._clock.phase("backward"):
                    output.loss.backward()
            self._read.append((batch.index_B, output.sums["loss"]))
            add_sums(sums, output.sums)
        return sums

    def _exchange(self, *, is_last: bool) -> AbstractContextManager[object]:
        if is_last or not isinstance(self.parts.module, DistributedDataParallel):
            return nullcontext()
        held: AbstractContextManager[object] = self.parts.module.no_sync()
        return held

    def _pairs(self, step: int) -> Iterator[tuple[Batch, TeacherSignal | None]]:
        """The feed's pairs; what passes until one is there is the teacher's time."""
        pairs = self.parts.feed.pairs(step)
        while True:
            with self._clock.phase("teacher"):
                pair = next(pairs, None)
            if pair is None:
                return
            yield pair

    def _check(self, loss: float, norm: float) -> None:
        """Stop before a broken number reaches the weights; every rank sees the same sums."""
        try:
            warning = self._guard.check(loss, norm)
        except LossError as error:
            raise type(error)(f"{error} in step {self.progress.step + 1}{self._worst()}") from None
        if warning is not None:
            log.warning("step %d: %s%s", self.progress.step + 1, warning, self._worst())

    def _worst(self) -> str:
        """Names the micro-batch with the largest loss, of all ranks."""
        mine = [(float(value), index_B.tolist()) for index_B, value in self._read]
        every = [pair for part in self.parts.world.gather_objects(mine) for pair in part]
        value, index = max(every, key=lambda pair: (not math.isfinite(pair[0]), pair[0]))
        share = f"{value:.4g} of it" if math.isfinite(value) else str(value)
        return f"; {share} from the batch of sequences {index}"

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
        if seconds := self._clock.read():
            record["seconds"] = seconds
        self._write(record)
        line = log_line({"step": self.progress.step, **record}, self.settings.max_steps)
        self.parts.show(line)
        if self.progress.step == 1 or self._due(self.settings.log_every):
            log.info(line)

    def _merge(self) -> None:
        anchor = self.parts.anchor
        if anchor is not None and anchor.due(self.progress.step):
            move = anchor.merge(self.parts.masters)
            self._write({"event": "sfa", "l2": move.l2, "max": move.max})

    def _evaluate(self) -> None:
        with self._forecast.measure("evaluations"):
            results = self.parts.evaluate()
        if results:
            keeper = self.parts.keeper
            objective = None if keeper is None else keeper.objective(results)
            judged = {} if keeper is None else {"judge": keeper.judge}
            self._write({"eval": results, "held_out_objective": objective, **judged})
            for name, values in results.items():
                shown = "  ".join(f"{key} {value:z.4f}" for key, value in values.items())
                log.info("held-out %s at step %d: %s", name, self.progress.step, shown)
            if keeper is not None and objective is not None:
                self._judge(keeper, objective)
        self._watch = Stopwatch()

    def _judge(self, keeper: BestKeeper, objective: float) -> None:
        """Keep the best checkpoint, and end a run that has stopped getting better."""
        improved = keeper.see(self.progress.step, objective)
        if self.progress.step:
            self._forecast.judged(improved=improved)
        if improved:
            self._save()  # whole before it is called the best; at step 0 there is nothing to save
            keeper.write()
        elif self._is_out_of_patience() and keeper.best is not None:
            self._ends_early, best = True, keeper.best.step
            log.info("no better on held-out text since step %d: the run ends here", best)

    def _is_out_of_patience(self) -> bool:
        keeper, patience = self.parts.keeper, self.settings.patience
        return keeper is not None and patience is not None and keeper.since >= patience

    def _save(self) -> None:
        """Save, unless this very step is saved already."""
        if self._saved_at == self.progress.step:
            return
        with self._forecast.measure("checkpoints"):
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
