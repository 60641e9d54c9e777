"""The loss curve of adamw-8bit beside fp32 AdamW's: the embedded model, on a CPU, in minutes.

python benchmarks/optimizer_quality.py [--steps 64] [--batch-size 4] [--seeds 0 1] [--beta2 0.95]

The demo's training (configs/demo.yaml) of one converted model, with both optimizers on the same
text in the same order. The difference between seeds says how much of a difference is noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
KINDS = ("adamw", "adamw-8bit")


def nexus(*words: object) -> None:
    """Run one command as a user does."""
    command = [sys.executable, "-m", "nexus_cli", *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def train(kind: str, seed: int, folder: Path, args: argparse.Namespace) -> list[dict]:
    """The metrics of one run."""
    output = folder / f"{kind}-{seed}"
    nexus(
        *("train", "-c", ROOT / "configs" / "demo.yaml", "-w", folder, "--optimizer", kind),
        *("--max-steps", args.steps, "--output-dir", output, "--device", "cpu"),
        *("--set", f"data.seed={seed}", "--set", f"optimizer.beta2={args.beta2}"),
        *("--set", f"evaluation.every={args.steps}", "--batch-size", args.batch_size),
    )
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(records: list[dict]) -> list[float]:
    """Training loss of every step."""
    return [record["loss"] for record in records if "loss" in record]


def held_out(records: list[dict]) -> dict[str, float]:
    """Loss on held-out text at the end, by source."""
    last = [record["eval"] for record in records if "eval" in record][-1]
    return {name: values["loss"] for name, values in last.items()}


def compare(seed: int, folder: Path, args: argparse.Namespace) -> dict:
    """Both optimizers from the same start on the same text."""
    runs = {kind: train(kind, seed, folder, args) for kind in KINDS}
    curves = {kind: curve(records) for kind, records in runs.items()}
    apart = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    return {
        "seed": seed,
        "largest_difference": max(apart),
        "mean_difference": statistics.mean(apart),
        **{f"{kind} first": values[0] for kind, values in curves.items()},
        **{
            f"{kind} last quarter": statistics.mean(values[-len(values) // 4 :])
            for kind, values in curves.items()
        },
        **{f"{kind} held-out": held_out(records) for kind, records in runs.items()},
        "curves": curves,
    }


def main() -> None:
    """Convert once, train twice a seed, print what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    versions = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(versions)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nexus("convert", "-w", folder, "--init-strategy", "random")
        results = [compare(seed, folder, args) for seed in args.seeds]
    for result in results:
        for key, value in result.items():
            if key != "curves":
                print(f"{key:26} {value}")
    if args.json:
        print(json.dumps({**versions, "steps": args.steps, "beta2": args.beta2, "runs": results}))


if __name__ == "__main__":
    main()
