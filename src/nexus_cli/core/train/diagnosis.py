"""What a run's records say, in plain words: for somebody who reads one thing in the morning."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

LEARNED = 0.999  # of a perplexity; less of a change is none
CLIPPED_OFTEN = 0.3  # of the steps; clipping is for accidents
MOVED = 0.1  # nats of KL on text that was only to be held
CLOSED = 1e-3  # mean size of gates below which a shared expert hardly speaks
ROUTERS_APART = 0.9  # share of a token's experts that teacher and student have in common
STILL_FALLING = 0.02  # of the loss, over the last quarter of the steps
WAITING = 0.5  # of a step's time spent before the student can begin
FEWEST = 8  # steps below which no trend is told


def diagnose(records: Sequence[Record], replay: Sequence[str] = ()) -> list[str]:
    """Sentences about a run that has ended.

    Args:
        records: of ``metrics.jsonl``, in order.
        replay: names of the sources that were only to be held, not learned.
    """
    known = [_without_nulls(record) for record in records]
    steps = [record for record in known if "loss" in record]
    evaluations = [record for record in known if record.get("eval")]
    return [
        *_learned(evaluations, replay),
        *_best(evaluations),
        *_trend(steps, evaluations),
        *_gates(steps),
        *_clipping(steps),
        *_routers(steps),
        *_time(steps),
    ]


def _without_nulls(value: Any) -> Any:
    """A record without what was no number when it was written."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [item for item in value if item is not None]
    return value


def _learned(evaluations: Sequence[Record], replay: Sequence[str]) -> Iterator[str]:
    if len(evaluations) < 2:
        return
    first, last = evaluations[0]["eval"], evaluations[-1]["eval"]
    for name in sorted((first.keys() & last.keys()) - set(replay)):
        if not all("perplexity" in end[name] for end in (first, last)):
            continue
        before, after = first[name]["perplexity"], last[name]["perplexity"]
        if after < LEARNED * before:
            yield f"learned: held-out perplexity of {name} fell from {before:.2f} to {after:.2f}"
        else:
            yield (
                f"not learned: held-out perplexity of {name} went from {before:.2f} to "
                f"{after:.2f}; try a higher --learning-rate, or more steps"
            )
    for name in sorted(last.keys() & set(replay)):
        moved = last[name].get("kd")
        if moved is None:
            continue
        if moved > MOVED:
            yield (
                f"forgotten: on {name} the model is {moved:.3f} nats a token from the original; "
                "give that source a larger share or kd weight, or lower --learning-rate"
            )
        else:
            yield f"kept: on {name} the model is {moved:z.4f} nats a token from the original"


def _best(evaluations: Sequence[Record]) -> Iterator[str]:
    judged = [e for e in evaluations if e.get("held_out_objective") is not None]
    if len(judged) < 3:
        return
    best = min(judged, key=lambda record: float(record["held_out_objective"]))
    if best["step"] == judged[-1]["step"]:
        return
    if best["step"] == 0:
        yield "no evaluation was better than the start: these weights and rates do not fit the text"
    else:
        yield (
            f"past its best: on held-out text step {best['step']} was better than the end; use "
            f"checkpoint-{best['step']}, and fewer steps or more text next time"
        )


def _trend(steps: Sequence[Record], evaluations: Sequence[Record]) -> Iterator[str]:
    if len(steps) < FEWEST:
        return
    quarter = len(steps) // 4
    before = statistics.fmean(record["loss"] for record in steps[-2 * quarter : -quarter])
    after = statistics.fmean(record["loss"] for record in steps[-quarter:])
    judged = [e["held_out_objective"] for e in evaluations if e.get("held_out_objective")]
    falls = not judged or judged[-1] == min(judged)
    if falls and before > 0 and (before - after) / before > STILL_FALLING:
        yield "still falling at the end: more steps would help"


def _gates(steps: Sequence[Record]) -> Iterator[str]:
    if steps and steps[-1].get("gate_mean_abs", 1.0) < CLOSED:
        yield (
            f"the gates hardly opened ({steps[-1]['gate_mean_abs']:.2g} on average): raise "
            "optimizer.gate_learning_rate, or take more steps"
        )


def _clipping(steps: Sequence[Record]) -> Iterator[str]:
    clipped = [record["clipped"] for record in steps if "clipped" in record]
    if clipped and (share := statistics.fmean(clipped)) > CLIPPED_OFTEN:
        yield (
            f"{share:.0%} of the steps were clipped: lower --learning-rate, or raise "
            "optimizer.clip_norm"
        )


def _routers(steps: Sequence[Record]) -> Iterator[str]:
    watched = [record for record in steps if "drift_topk_overlap" in record]
    if watched and (overlap := watched[-1]["drift_topk_overlap"]) < ROUTERS_APART:
        layers = watched[-1].get("drift_layers", {}).get("topk_overlap", [])
        worst = f", least in layer {layers.index(min(layers))}" if layers else ""
        yield (
            f"tokens go to {overlap:.0%} of the experts that they went to before{worst}: "
            "a source's router weight holds them"
        )


def _time(steps: Sequence[Record]) -> Iterator[str]:
    timed = [record["seconds"] for record in steps if record.get("seconds")]
    if not timed:
        return
    total = {name: sum(float(t.get(name, 0.0)) for t in timed) for name in timed[-1]}
    whole = sum(total.values()) or 1.0
    shares = ", ".join(f"{name} {value / whole:.0%}" for name, value in total.items())
    yield f"a step's time: {shares}"
    if total.get("teacher", 0.0) > WAITING * whole:
        yield "the teacher takes most of it: nexus precompute and train-offline would spare that"
