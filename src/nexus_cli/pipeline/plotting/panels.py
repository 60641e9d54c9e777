"""Which measures make a panel, and which panels a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nexus_cli.pipeline.plotting.series import Key, Run, eval_names, extract


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        name: File name of the panel, and its anchor in the report.
        title: What it shows.
        unit: Label of the vertical axis.
        keys: Keys of the metrics; the first is drawn solid, the next dashed.
        labels: Names of the keys where there are several.
        varies: Draw it only if it ever changes; a constant is said in a note instead.
        log: Logarithmic axis when the values span more than a factor of fifty.
        clips: Mark steps at which the gradient was clipped.
        smooth: Draw a moving mean over the raw curve.
    """

    name: str
    title: str
    unit: str
    keys: tuple[Key, ...]
    labels: tuple[str, ...] = ()
    varies: bool = False
    log: bool = False
    clips: bool = False
    smooth: bool = True


@dataclass(frozen=True)
class Figure:
    """A file of panels."""

    name: str
    title: str
    panels: tuple[Panel, ...]


LOSSES = Figure(
    "losses",
    "Losses",
    (
        Panel("loss", "Total loss", "nats a token", ("loss",)),
        Panel("cross-entropy", "Cross entropy with the text", "nats a token", ("ce",)),
        Panel("kl", "Divergence from the teacher (kd)", "nats a token", ("kd",)),
        Panel("agreement", "Same most likely token as the teacher", "share", ("agreement",)),
    ),
)
ROUTER = Figure(
    "router",
    "Router: drift from the teacher, and load",
    (
        Panel("router-kl", "Router KL loss", "nats", ("router_kl",), varies=True),
        Panel("drift-kl", "Router drift: KL", "nats", ("drift_kl",)),
        Panel("drift-l1", "Router drift: L1 distance", "probability", ("drift_l1",)),
        Panel("drift-entropy", "Router drift: change of entropy", "nats", ("drift_entropy",)),
        Panel("drift-overlap", "Chosen experts in common", "share", ("drift_topk_overlap",)),
        Panel("load", "Load of the busiest expert", "share of tokens", ("load_max",)),
        Panel("load-balance", "Load-balance loss", "", ("load_balance",), varies=True),
        Panel("router-z", "Router z-loss", "", ("router_z",), varies=True),
    ),
)
OPTIMISER = Figure(
    "optimiser",
    "Optimiser and schedules",
    (
        Panel("gradient-norm", "Gradient norm", "", ("grad_norm",), log=True, clips=True),
        Panel(
            "learning-rate",
            "Learning rate",
            "",
            ("learning_rate", "gate_learning_rate"),
            ("shared experts", "gates"),
            log=True,
            smooth=False,
        ),
        Panel("gate", "Gate size, mean of layers", "|g|", ("gate_mean_abs",), smooth=False),
        Panel("temperature", "Temperature of kd", "", ("temperature",), varies=True, smooth=False),
        Panel("kl-weight", "Weight of kd", "", ("kd_weight",), varies=True, smooth=False),
    ),
)
SPEED = Figure(
    "speed",
    "Throughput and memory",
    (
        Panel("throughput", "Throughput", "tokens a second", ("tokens_per_second",)),
        Panel("memory", "Peak memory", "GiB", ("memory_gib",), smooth=False),
    ),
)


def figures(runs: Sequence[Run]) -> list[Figure]:
    """All figures that these runs could fill."""
    names = dict.fromkeys(name for run in runs for name in eval_names(run.records))
    held_out = [p for n, name in enumerate(names) for p in _evaluation(n, name)]
    evaluation = Figure("evaluation", "Held-out text", tuple(held_out))
    return [LOSSES, evaluation, ROUTER, OPTIMISER, SPEED]


def _evaluation(number: int, name: str) -> tuple[Panel, Panel]:
    """Panels of one text; a file is shown by its name alone."""
    short = name.rpartition("/")[2]
    perplexity = Panel(
        f"perplexity-{number}",
        f"Perplexity: {short}",
        "perplexity",
        (("eval", name, "perplexity"),),
        smooth=False,
    )
    kl = Panel(
        f"held-out-kl-{number}",
        f"KL to the teacher: {short}",
        "nats a token",
        (("eval", name, "kd"),),
        smooth=False,
    )
    return perplexity, kl


def note_if_empty(panel: Panel, runs: Sequence[Run]) -> str | None:
    """Why a panel is left out; ``None`` if it has something to show."""
    curves = [extract(run.records, key) for run in runs for key in panel.keys]
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return f"{panel.title}: not measured"
    if all(len(curve.gaps) == len(curve) for curve in curves):
        return f"{panel.title}: never a finite number"
    constants = {curve.constant for curve in curves}
    if panel.varies and len(constants) == 1 and None not in constants:
        return f"{panel.title}: {constants.pop():g} throughout"
    return None
