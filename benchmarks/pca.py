"""How long `nexus pca` takes on the statistics of a million tokens of the 120B model's shape.

python benchmarks/pca.py [--layers 36] [--experts 128] [--runs 5] [--json]

Two times: the whole command in a fresh process, and its work alone in this one. The statistics
are made up (correlated logits); their size, and so the time, does not depend on the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nexus_cli.config.pca import PcaConfig
from nexus_cli.core.router.moments import Reservoir, RouterMoments, TokenSums
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.pca import run
from nexus_cli.pipeline.router_statistics import save_moments

SAMPLES, TOKENS, TOP_K, WIDTH = 4000, 1_000_000, 4, 2880


def synthetic_moments(num_layers: int, num_experts: int) -> RouterMoments:
    """Sums over samples of correlated logits, multiplied up to a million tokens.

    What hidden units contribute is made up too, as far from even as one exponential makes it.
    """
    rng = np.random.default_rng(0)
    body, sample = TokenSums.zeros(num_layers, num_experts), []
    for layer in range(num_layers):
        causes = max(3, num_experts // 5)
        mixing = 1.3 * rng.normal(size=(causes, num_experts))
        mixing *= rng.random(mixing.shape) < 0.25
        logits = rng.normal(size=(SAMPLES, causes)) @ mixing
        logits += 0.6 * rng.normal(size=logits.shape)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        sample.append(p.astype(np.float16))
        best = np.argsort(-p, axis=1)[:, :TOP_K]
        applied = np.zeros_like(p)
        np.put_along_axis(applied, best, np.take_along_axis(p, best, 1), 1)
        body.probability_LE[layer] = p.sum(0)
        body.outer_LEE[layer] = p.T @ p
        body.weight_LE[layer] = (applied / applied.sum(1, keepdims=True)).sum(0)
        body.top1_LE[layer] = np.bincount(best[:, 0], minlength=num_experts)
        body.topk_LE[layer] = np.bincount(best.ravel(), minlength=num_experts)
    times = TOKENS // SAMPLES
    sums = (body.probability_LE, body.outer_LEE, body.top1_LE, body.topk_LE, body.weight_LE)
    reservoir = Reservoir(SAMPLES, np.arange(SAMPLES, dtype=np.uint64), np.stack(sample, axis=1))
    none = TokenSums.zeros(num_layers, num_experts)
    units = rng.exponential(TOKENS, size=(num_layers, num_experts, WIDTH))
    whole = TokenSums(TOKENS, *(x * times for x in sums))
    return RouterMoments(TOP_K, whole, none, reservoir, units)


def whole_command(source: Path, folder: Path, plots: bool) -> float:
    """Wall time of the command as a user types it."""
    line = [sys.executable, "-m", "nexus_cli", "pca", "--force", "--input", str(source)]
    line += ["--output", str(folder / "pca_stats.json")] + ([] if plots else ["--no-plots"])
    start = time.perf_counter()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def work_alone(source: Path, folder: Path, plots: bool) -> float:
    """Wall time without Python's start and imports."""
    config = PcaConfig(input=source, output=folder / "pca_stats.json", plots=plots)
    start = time.perf_counter()
    run(config, Workspace(folder), force=True)
    return time.perf_counter() - start


def main() -> None:
    """Print medians in seconds; with --json, the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result: dict[str, float] = {"layers": args.layers, "experts": args.experts, "tokens": TOKENS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "router_probs.npz"
        moments = synthetic_moments(args.layers, args.experts)
        save_moments(source, moments, {"model": "synthetic", "model_fingerprint": "-"})
        result["input_mib"] = round(source.stat().st_size / 2**20, 1)
        for label, measure in (("command", whole_command), ("work", work_alone)):
            for plots in (True, False):
                times = [measure(source, folder, plots) for _ in range(args.runs + 1)][1:]
                key = f"{label}_{'with' if plots else 'without'}_plots"
                result[f"{key}_median_s"] = round(statistics.median(times), 3)
                result[f"{key}_min_s"] = round(min(times), 3)
    result["runs"], result["load"] = args.runs, round(os.getloadavg()[0], 2)
    for key, value in result.items():
        sys.stderr.write(f"{key:32} {value}\n")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
