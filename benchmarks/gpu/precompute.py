"""``nexus precompute`` at the 20B shape: tokens a second, and how long the teacher waits.

python benchmarks/gpu/precompute.py [--batch-size 16] [--seq-len 1024] [--num-steps 18] [--json]

Random weights, written first (14 GB) and removed at the end; the bundled texts, of which 18 steps
of 16 x 1024 tokens can be made. A random teacher is flat, so that every target keeps all 32
entries: more to code than a real one gives. The figures are the command's own, of three runs after
a first: the fastest, and the median share.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from synthetic_checkpoint import SHAPES, write_checkpoint

SAID = re.compile(r"([\d,]+) tokens a second; the teacher waited for the disk ([\d.]+)%")
TEXT = "bundled-general,bundled-tool-calling"


def precompute(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One run, and what it said."""
    command = [
        *(sys.executable, "-m", "nexus_cli", "precompute", "--teacher-model", folder / "model"),
        *("--data", TEXT, "--batch-size", args.batch_size, "--seq-len", args.seq_len),
        *("--num-steps", args.num_steps, "--output-dir", folder / "store"),
        *("--workspace", folder / "workspace", "--force"),
    ]
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True)
    found = SAID.search(done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(done.stderr)
    return {
        "tokens_per_second": float(found[1].replace(",", "")),
        "waited_share": float(found[2]) / 100,
    }


def main() -> None:
    """Write the model, run twice; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--num-steps", type=int, default=18)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model", SHAPES["20b"])
        os.sync()  # or the shards' own flushes would wait for the model's bytes
        runs = [precompute(folder, args) for _ in range(4)][1:]
    found = {
        "tokens_per_second": max(run["tokens_per_second"] for run in runs),
        "waited_share": sorted(run["waited_share"] for run in runs)[1],
    }
    for key, value in found.items():
        print(f"{key:20}{value:14,.3f}")
    if args.json:
        print(json.dumps({**machine(), **vars(args), **found}))


if __name__ == "__main__":
    main()
