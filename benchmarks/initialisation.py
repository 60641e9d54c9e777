"""What a shared expert should start from: every strategy and start, by what training makes of it.

python benchmarks/initialisation.py [--seeds 0 1 2] [--steps 1000] [--at 50 200 1000] [--jobs 1]
    [--strategies pca_topK neurons ...] [--starts gate zero-down scaled] [--results FILE] [--json]

The demo's training of the embedded model (configs/demo.yaml), once for every strategy, start and
seed; the seed is that of random weights and of the order of the text. Held-out text of both kinds,
the same for all, is judged at step 0 and after ``--at`` steps: the domain's cross entropy, and the
general text's KL to the original, in nats a token; ``mean`` is the first over ``--at``. Intervals
are Student's, 95 %, over the seeds. Differences to ``--baseline`` are taken run by run, from the
run of the same seed, which sees the same text in the same order, and averaged within a seed first:
runs of one seed are not independent.

The figures of each run are kept in ``--results`` with the settings that made them; a run whose
figures are there is not made again, so the table can be made in parts. Fourteen runs share one GPU
well (``--device cuda --jobs 14``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from runs import DEMO, metrics, nexus, versions

DOMAIN, GENERAL = "bundled-tool-calling", "bundled-general"
JUDGED = f"[{{name: {DOMAIN}, split: held-out}}, {{name: {GENERAL}, split: held-out}}]"
STRATEGIES = (
    "random",
    "top1",
    "top1_average",
    "top4_average",
    "pca_top8",
    "pca_topK",
    "neurons_top8",
    "neurons",
    "neurons_weighted_top8",
    "neurons_weighted",
)
STARTS = ("gate", "zero-down", "scaled")
NAMES = ("domain_loss", "general_kl")
SETTINGS = ("steps", "at", "sequences", "tokens", "top_k")  # that figures depend on
Figures = dict[str, dict[str, float]]  # by step: domain_loss and general_kl


@dataclass(frozen=True)
class Run:
    """One cell of the table, with one seed."""

    strategy: str
    start: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.strategy}.{self.start}.{self.seed}"


def select(folder: Path, args: argparse.Namespace) -> None:
    """Router statistics and chosen experts of the embedded model, for all runs."""
    nexus(
        *("collect", "-c", DEMO, "-w", folder, "--target-tokens", args.tokens),
        *("--max-candidates", 10_000, "--device", args.device),
    )
    nexus("pca", "-c", DEMO, "-w", folder, "--top-k", args.top_k, "--no-plots")


def train(run: Run, folder: Path, args: argparse.Namespace) -> Figures:
    """Convert and train in a process of its own; what the evaluations found."""
    model, output = folder / run.name / "model", folder / run.name / "train"
    workspace = folder / run.name / "workspace"
    nexus(
        *("convert", "-w", workspace, "--pca-stats", folder / "pca" / "pca_stats.json"),
        *("--init-strategy", run.strategy, "--start", run.start, "--output", model),
        *("--set", f"seed={run.seed}"),
    )
    nexus(
        *("train", "-c", DEMO, "-w", workspace, "--student-model", model, "--output-dir", output),
        *("--max-steps", args.steps, "--device", args.device),
        *("--set", f"data.seed={run.seed}", "--set", f"evaluation.every={math.gcd(*args.at)}"),
        *("--set", f"evaluation.sequences={args.sequences}"),
        *("--set", f"evaluation.data.sources={JUDGED}", "--set", "evaluation.data.seq_len=512"),
        *("--set", "evaluation.keep_best=false", "--set", "runtime.save_every=null"),
    )
    found = {record["step"]: record["eval"] for record in metrics(output) if record.get("eval")}
    return {
        str(step): {
            "domain_loss": found[step][DOMAIN]["loss"],
            "general_kl": found[step][GENERAL]["kd"],
        }
        for step in (0, *args.at)
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval (NaN of a single value)."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(count)
    return mean, float(student_t.ppf(0.975, count - 1)) * error


def cells(found: dict[Run, Figures]) -> list[dict[str, Any]]:
    """A row for every strategy and start, the lowest domain loss over all steps first."""
    rows = []
    for cell in dict.fromkeys((run.strategy, run.start) for run in found):
        mine = [found[run] for run in found if (run.strategy, run.start) == cell]
        row: dict[str, Any] = {"strategy": cell[0], "start": cell[1], "runs": len(mine)}
        for step, name in itertools.product(mine[0], NAMES):
            row[f"{name}@{step}"] = interval([figures[step][name] for figures in mine])
        rows.append(row | {"domain_loss": interval([_over_steps(figures) for figures in mine])})
    return sorted(rows, key=lambda row: row["domain_loss"][0])


def differences(found: dict[Run, Figures], field: str, baseline: str) -> list[dict[str, Any]]:
    """A row for every value of a run's ``field``, over all values of the other one.

    Each run is compared with the one that differs in nothing but having ``baseline`` there.
    """
    rows = []
    for value in dict.fromkeys(getattr(run, field) for run in found):
        pairs = [
            (run.seed, found[run], found[other])
            for run in found
            if getattr(run, field) == value
            and (other := replace(run, **{field: baseline})) in found
        ]
        if not pairs:
            continue
        row: dict[str, Any] = {field: value, "runs": len(pairs)}
        for step, name in itertools.product(pairs[0][1], NAMES):
            row[f"{name}@{step}"] = _by_seed(
                [(seed, a[step][name] - b[step][name]) for seed, a, b in pairs]
            )
        over_steps = [(seed, _over_steps(a) - _over_steps(b)) for seed, a, b in pairs]
        rows.append(row | {"domain_loss": _by_seed(over_steps)})
    return sorted(rows, key=lambda row: row["domain_loss"][0])


def _by_seed(values: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The interval of the seeds' means."""
    seeds = dict.fromkeys(seed for seed, _ in values)
    return interval([statistics.fmean(v for own, v in values if own == seed) for seed in seeds])


def _over_steps(figures: dict[str, dict[str, float]]) -> float:
    """Mean of the domain's loss after training began: a number for fast and for good."""
    return statistics.fmean(each["domain_loss"] for step, each in figures.items() if step != "0")


def table(rows: Sequence[dict[str, Any]], steps: Sequence[int]) -> str:
    """Rows for a page of Markdown."""
    keys = [key for key in ("strategy", "start") if key in rows[0]]
    columns = [("mean", "domain_loss")]
    columns += [(f"domain {step}", f"domain_loss@{step}") for step in steps]
    columns += [(f"KL {step}", f"general_kl@{step}") for step in steps]
    heads = [*keys, *(head for head, _ in columns)]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        shown = [*(row[key] for key in keys), *(_cell(row[name]) for _, name in columns)]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell(value: tuple[float, float]) -> str:
    mean, half = value
    return f"{mean:.4f}" if math.isnan(half) else f"{mean:.4f} ± {half:.4f}"


def measure(runs: Sequence[Run], results: Path, args: argparse.Namespace) -> dict[Run, Figures]:
    """Make the runs whose figures are not there yet; read all."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    kept = json.loads(results.read_text()) if results.exists() else {}
    if kept and kept["settings"] != settings:
        raise SystemExit(f"{results} has the figures of other settings: {kept['settings']}")
    found = kept.get("runs", {})
    missing = [run for run in runs if run.name not in found]
    writing = threading.Lock()

    def make(run: Run, folder: Path) -> None:
        figures = train(run, folder, args)
        with writing:
            found[run.name] = figures
            whole = {"settings": settings, "runs": found}
            results.write_text(json.dumps(whole, indent=1, sort_keys=True))

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        if missing:
            select(Path(name), args)
        for done in [pool.submit(make, run, Path(name)) for run in missing]:
            done.result()
    return {run: found[run.name] for run in runs}


def main() -> None:
    """Make the table; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--starts", nargs="+", default=STARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--baseline", nargs=2, default=("random", "gate"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--at", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--sequences", type=int, default=64, help="held out")
    parser.add_argument("--tokens", type=int, default=200_000, help="for the statistics")
    parser.add_argument("--top-k", type=int, default=24, help="experts chosen in every layer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    runs = [Run(*cell) for cell in itertools.product(args.strategies, args.starts, args.seeds)]
    with tempfile.TemporaryDirectory() as name:
        results = args.results or Path(name) / "results.json"
        found = measure(runs, results, args)
    tables = {
        "every strategy from every start": cells(found),
        f"strategies, less {args.baseline[0]}": differences(found, "strategy", args.baseline[0]),
        f"starts, less {args.baseline[1]}": differences(found, "start", args.baseline[1]),
    }
    for title, rows in tables.items():
        if rows:
            print(f"\n{title}\n\n{table(rows, [0, *args.at])}")
    if args.json:
        print(json.dumps({**versions(), **vars(args), "results": None, "tables": tables}))


if __name__ == "__main__":
    main()
