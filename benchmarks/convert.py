"""What `nexus convert` takes on a checkpoint of the real shapes: time, memory, bytes.

python benchmarks/convert.py [--shape 20b|120b] [--layers N] [--strategy pca_topK] [--copy]
                             [--folder DIR] [--keep] [--json]

It writes a synthetic checkpoint (see synthetic_checkpoint.py; the whole 120B takes 66 GB of disk,
the 20B 14 GB), chooses 24 experts a layer with `nexus pca` on made-up statistics, and runs the
command in a process of its own twice: first after the checkpoint was dropped from the page cache,
then with the cache as that left it. `seconds` is the first run, `seconds_warm` the second: the work
beyond reading, where the cache holds what is read. Memory is the larger of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from nexus_cli.io import manifest, model_dir
from nexus_cli.pipeline.router_statistics import save_moments
from pca import synthetic_moments
from synthetic_checkpoint import SHAPES, Shape, write_checkpoint
from watched import Watched, drop_from_cache, run_watched

EXPERTS_A_LAYER = 24
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def write_statistics(folder: Path, model: Path, shape: Shape) -> Path:
    """Choose experts as a user does, from made-up router statistics of ``model``."""
    source, chosen = folder / "router_probs.npz", folder / "pca_stats.json"
    moments = synthetic_moments(shape.layers, shape.experts)
    identity = model_dir.fingerprint(model)
    save_moments(source, moments, {"model": str(model), "model_fingerprint": identity})
    command = [sys.executable, "-m", "nexus_cli", "pca", "--no-plots", "--input", str(source)]
    command += ["--output", str(chosen), "--top-k", str(EXPERTS_A_LAYER)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return chosen


def measure(folder: Path, strategy: str, copy: bool) -> tuple[Watched, Watched]:
    """Convert with a cold cache, then again with a warm one."""
    model, output = folder / "model", folder / "converted"
    command = [sys.executable, "-m", "nexus_cli", "convert", "--input", str(model)]
    command += ["--output", str(output), "--pca-stats", str(folder / "pca_stats.json")]
    command += ["--init-strategy", strategy, "-w", str(folder / "workspace"), "--force"]
    command += ["--copy"] * copy
    drop_from_cache(model)
    cold = run_watched(command, OFFLINE)
    shutil.rmtree(output)
    return cold, run_watched(command, OFFLINE)


def report(cold: Watched, warm: Watched) -> dict[str, Any]:
    """The figures of both runs."""
    return {
        "seconds": round(cold.seconds, 2),
        "seconds_warm": round(warm.seconds, 2),
        "cpu_seconds": round(cold.cpu_seconds, 2),
        "peak_rss_gib": _gib(max(cold.peak_resident, warm.peak_resident)),
        "peak_anonymous_gib": _gib(max(cold.peak_anonymous, warm.peak_anonymous)),
        "bytes_read": cold.read_from_disk,
        "bytes_read_by_calls": cold.read,
        "bytes_read_warm": warm.read_from_disk,
        "bytes_written": cold.written,
    }


def _gib(count: int) -> float:
    return round(count / 2**30, 3)


def benchmark(folder: Path, name: str, shape: Shape, strategy: str, copy: bool) -> dict[str, Any]:
    """Write a checkpoint into ``folder``, convert it, and say what that took."""
    size = write_checkpoint(folder / "model", shape)
    write_statistics(folder, folder / "model", shape)
    load = os.getloadavg()[0]
    figures = report(*measure(folder, strategy, copy))
    return figures | {
        "shape": name,
        "layers": shape.layers,
        "of_layers": SHAPES[name].layers,
        "experts": shape.experts,
        "strategy": strategy,
        "copy": copy,
        "checkpoint_bytes": size,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": manifest.environment(),
        "load_before": round(load, 2),
    }


def main() -> None:
    """Print the figures; with --json, the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="20b")
    parser.add_argument("--layers", type=int, help="fewer than the model has, where disk is short")
    parser.add_argument("--strategy", default="pca_topK", help="as nexus convert --init-strategy")
    parser.add_argument("--copy", action="store_true", help="copy the shards; do not link them")
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave what was written")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = replace(shape, layers=args.layers or shape.layers)
    folder = Path(tempfile.mkdtemp(prefix="nexus-convert-", dir=args.folder))
    try:
        result = benchmark(folder, args.shape, shape, args.strategy, args.copy)
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    result["folder"] = str(folder) if args.keep else None
    for key, value in result.items():
        sys.stderr.write(f"{key:22} {value}\n")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
