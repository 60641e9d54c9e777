"""Everything that changes during training, as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["constant", "linear", "cosine", "wsd"]
Stage = Literal["warmup", "stable", "decay"]

_WSD_DECAY = 0.2


@dataclass(frozen=True)
class ScheduleValues:
    """What holds during one optimizer step.

    Attributes:
        lr_scale: multiplies every parameter group's own learning rate; never 0 before the end.
        temperature: of the vocabulary and router KL.
        kd_scale: multiplies the weight of the vocabulary KL.
        router_bias_scale: multiplies ``lr_scale`` for the router biases; 0 once frozen.
        stage: where the learning rate is.
    """

    lr_scale: float
    temperature: float
    kd_scale: float
    router_bias_scale: float
    stage: Stage


@dataclass(frozen=True)
class Schedule:
    """Steps count from 0; ``at(step)`` holds for the update that step number ``step`` makes.

    The warm-up rises linearly, ``(step + 1) / warmup_steps``, so that the first step learns
    something and the last of the warm-up runs at the peak. ``constant`` stays there. The others
    stay for ``stable_steps`` and then decay to ``final_ratio`` of the peak: ``linear`` and ``wsd``
    along a line, ``cosine`` along half a cosine.

    Attributes:
        total_steps: number of optimizer steps of the run.
        decay: shape after the warm-up.
        warmup_steps: length of the warm-up; 0 for none.
        stable_steps: steps at the peak between warm-up and decay. ``None`` is 0, but for ``wsd``
            whatever leaves the last fifth of the steps for the decay.
        final_ratio: what the decay ends at, relative to the peak.
        temperature: at the start.
        final_temperature: at the last step; ``None`` keeps ``temperature``.
        temperature_hold: fraction of the steps that keep ``temperature``, before it moves
            linearly to ``final_temperature``.
        kd_warmup_steps: the KL weight rises linearly from ``1 / kd_warmup_steps`` over these.
        router_bias_multiplier: learning rate of the router biases relative to their group's.
        router_bias_freeze_step: first step at which they stand still; ``None`` for never.
    """

    total_steps: int
    decay: Decay = "constant"
    warmup_steps: int = 0
    stable_steps: int | None = None
    final_ratio: float = 0.1
    temperature: float = 1.0
    final_temperature: float | None = None
    temperature_hold: float = 0.0
    kd_warmup_steps: int = 0
    router_bias_multiplier: float = 1.0
    router_bias_freeze_step: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be scheduled, while the user's settings are still at hand."""
        if self.total_steps < 1:
            raise ValueError(f"a schedule needs at least one step, not {self.total_steps}")
        if min(self.warmup_steps, self.stable_steps or 0, self.kd_warmup_steps) < 0:
            raise ValueError("warm-up and stable steps cannot be negative")
        if self.warmup_steps + (self.stable_steps or 0) > self.total_steps:
            raise ValueError(
                f"{self.warmup_steps} warm-up and {self.stable_steps or 0} stable steps "
                f"do not fit into {self.total_steps}"
            )
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio is a fraction of the peak, not {self.final_ratio}")
        if self.temperature <= 0 or self._last_temperature <= 0:
            raise ValueError("temperatures must be positive")
        if not 0 <= self.temperature_hold <= 1:
            raise ValueError(f"temperature_hold is a fraction, not {self.temperature_hold}")

    @classmethod
    def advanced(
        cls,
        total_steps: int,
        *,
        warmup_ratio: float = 0.5,
        stable_ratio: float = 0.2,
        final_ratio: float = 0.1,
        temperature: float = 4.0,
        final_temperature: float = 2.0,
        temperature_hold: float = 0.3,
        router_bias_multiplier: float = 0.001,
        router_bias_freeze_ratio: float | None = None,
    ) -> Schedule:
        """The DeepSeek-V3 style set: long warm-up, stable, cosine; biases slow and then frozen.

        Args:
            total_steps: number of optimizer steps of the run.
            warmup_ratio: share of the steps in the warm-up, also of the KL weight's.
            stable_ratio: share at the peak; the rest decays.
            final_ratio: the learning rate at the end, relative to the peak.
            temperature: at the start.
            final_temperature: at the end.
            temperature_hold: share of the steps before the temperature moves.
            router_bias_multiplier: learning rate of the router biases relative to their group's.
            router_bias_freeze_ratio: when the biases freeze; ``None`` for the end of the warm-up.
        """
        warmup_steps = round(warmup_ratio * total_steps)
        freeze = warmup_ratio if router_bias_freeze_ratio is None else router_bias_freeze_ratio
        return cls(
            total_steps=total_steps,
            decay="cosine",
            warmup_steps=warmup_steps,
            stable_steps=min(round(stable_ratio * total_steps), total_steps - warmup_steps),
            final_ratio=final_ratio,
            temperature=temperature,
            final_temperature=final_temperature,
            temperature_hold=temperature_hold,
            kd_warmup_steps=warmup_steps,
            router_bias_multiplier=router_bias_multiplier,
            router_bias_freeze_step=round(freeze * total_steps),
        )

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Every temperature that a step of the run has, in the order of the steps."""
        if self._last_temperature == self.temperature:
            return (self.temperature,)
        return tuple(dict.fromkeys(map(self._temperature, range(self.total_steps))))

    def at(self, step: int) -> ScheduleValues:
        """The values of step number ``step``; past the end, those of the end."""
        scale, stage = self._learning_rate(step)
        frozen = self.router_bias_freeze_step is not None and step >= self.router_bias_freeze_step
        return ScheduleValues(
            lr_scale=scale,
            temperature=self._temperature(step),
            kd_scale=_ramp(step, self.kd_warmup_steps),
            router_bias_scale=0.0 if frozen else self.router_bias_multiplier,
            stage=stage,
        )

    @property
    def _last_temperature(self) -> float:
        return self.temperature if self.final_temperature is None else self.final_temperature

    @property
    def _decay_start(self) -> int:
        if self.stable_steps is not None:
            return self.warmup_steps + self.stable_steps
        if self.decay == "wsd":
            return max(
                self.warmup_steps, self.total_steps - math.ceil(_WSD_DECAY * self.total_steps)
            )
        return self.warmup_steps

    def _learning_rate(self, step: int) -> tuple[float, Stage]:
        if step < self.warmup_steps:
            return _ramp(step, self.warmup_steps), "warmup"
        start = self._decay_start
        if self.decay == "constant" or step < start:
            return 1.0, "stable"
        # One step into the decay by its first step, and at the end only after the last one:
        # a decay to 0 wastes no step.
        progress = min(1.0, (step - start + 1) / (self.total_steps - start + 1))
        left = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return self.final_ratio + (1 - self.final_ratio) * left, "decay"

    def _temperature(self, step: int) -> float:
        start = self.temperature_hold * self.total_steps
        span = self.total_steps - 1 - start
        if step <= start or span <= 0:
            return self.temperature
        progress = min(1.0, (step - start) / span)
        return self.temperature + progress * (self._last_temperature - self.temperature)


def _ramp(step: int, length: int) -> float:
    """Linear from ``1 / length`` at step 0 to 1 at step ``length - 1``."""
    return min(1.0, (step + 1) / length) if length > 0 else 1.0
