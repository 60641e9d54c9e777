"""What a shared expert should start from: every strategy and start, by what training makes of it.

python benchmarks/initialisation.py [--seeds 0 1 2] [--steps 1000] [--at 50 200 1000] [--jobs 1]
    [--strategies pca_topK neurons ...] [--starts gate zero-down scaled] [--results FILE] [--json]

The demo's training of the embedded model (configs/demo.yaml), once for every strategy, start and
seed; the seed is that of random weights and of the order of the text. Held-out text of both kinds,
the same for all, is judged at step 0 and after ``--at`` steps: the domain's cross entropy, and the
general text's KL to the original, in nats a token. Intervals are Student's over the seeds; the
differences to ``--baseline`` are taken seed by seed, since a seed's runs see the same text.

The figures of each run are kept in ``--results``; a run whose figures are there is not made again,
so the table can be made in parts. Fourteen runs share one GPU well (``--device cuda --jobs 14``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
ALL = "(all)"
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


def summarise(found: dict[Run, Figures], baseline: tuple[str, str]) -> list[dict[str, Any]]:
    """A row for every strategy and start, and one for each of them over all of the other.

    The lowest domain loss at the last step comes first.
    """
    cells = list(dict.fromkeys((run.strategy, run.start) for run in found))
    cells += [(strategy, ALL) for strategy in dict.fromkeys(run.strategy for run in found)]
    cells += [(ALL, start) for start in dict.fromkeys(run.start for run in found)]
    rows = [_row(found, cell, baseline) for cell in cells]
    last = list(next(iter(found.values())))[-1]
    return sorted(rows, key=lambda row: row[f"domain_loss@{last}"][0])


def _row(
    found: dict[Run, Figures], cell: tuple[str, str], baseline: tuple[str, str]
) -> dict[str, Any]:
    """Intervals of one cell's runs, and of what sets each apart from the baseline of its seed."""
    mine = [run for run in found if _is_in(run, cell)]
    row: dict[str, Any] = {"strategy": cell[0], "start": cell[1], "runs": len(mine)}
    for step, name in itertools.product(found[mine[0]], ("domain_loss", "general_kl")):
        row[f"{name}@{step}"] = interval([found[run][step][name] for run in mine])
        others = [Run(*baseline, run.seed) for run in mine]
        if all(other in found for other in others):
            row[f"{name}@{step} - baseline"] = interval(
                [
                    found[run][step][name] - found[other][step][name]
                    for run, other in zip(mine, others, strict=True)
                ]
            )
    return row


def _is_in(run: Run, cell: tuple[str, str]) -> bool:
    return cell[0] in (run.strategy, ALL) and cell[1] in (run.start, ALL)


def table(rows: Iterable[dict[str, Any]], steps: Sequence[int], suffix: str = "") -> str:
    """The rows for a page of Markdown."""
    heads = ["strategy", "start", *(f"domain {s}" for s in steps), *(f"KL {s}" for s in steps)]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        cells = [row["strategy"], row["start"]]
        cells += [_cell(row[f"domain_loss@{step}{suffix}"], 4) for step in steps]
        cells += [_cell(row[f"general_kl@{step}{suffix}"], 4) for step in steps]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: tuple[float, float], digits: int) -> str:
    mean, half = value
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def measure(runs: Sequence[Run], results: Path, args: argparse.Namespace) -> dict[Run, Figures]:
    """Make the runs whose figures are not there yet; read all."""
    found = json.loads(results.read_text()) if results.exists() else {}
    missing = [run for run in runs if run.name not in found]
    writing = threading.Lock()

    def make(run: Run, folder: Path) -> None:
        figures = train(run, folder, args)
        with writing:
            found[run.name] = figures
            results.write_text(json.dumps(found, indent=1, sort_keys=True))

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
        rows = summarise(measure(runs, results, args), tuple(args.baseline))
    steps = [0, *args.at]
    print(table(rows, steps))
    if all("domain_loss@0 - baseline" in row for row in rows):
        print(f"\nDifferences to {' '.join(args.baseline)}, seed by seed:\n")
        print(table(rows, steps, " - baseline"))
    if args.json:
        print(json.dumps({**versions(), **vars(args), "results": None, "rows": rows}))


if __name__ == "__main__":
    main()
