"""The three ways to train, on the embedded model: steps a second, memory, and where time goes.

python benchmarks/training.py [--steps 16] [--batch-size 4] [--seq-len 512] [--device cpu] [--json]

``train`` with the student as its own teacher, ``train --teacher-model``, and ``train-offline`` from
a store that is made first. Each is a process of its own over the same text, evaluations and
checkpoints off. Overhead is everything but forward passes (the teacher's too) and the backward
pass. The first step, which warms up, is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from runs import DEMO, metrics, nexus, steps_of, versions

WORK = ("teacher", "forward", "backward")


def measure(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one run, from its records."""
    steps = [record for record in steps_of(records) if record.get("seconds")][1:]
    whole = [sum(step["seconds"].values()) for step in steps]
    shares = {
        phase: sum(step["seconds"].get(phase, 0.0) for step in steps) / sum(whole)
        for phase in steps[-1]["seconds"]
    }
    return {
        "steps_per_second": 1 / statistics.median(whole),
        "peak_memory_gib": max(step["memory_gib"] for step in steps),
        "shares": shares,
        "teacher_share": shares.get("teacher", 0.0),
        "overhead_share": 1 - sum(shares.get(phase, 0.0) for phase in WORK),
        "loss_at_the_end": steps[-1]["loss"],
    }


def main() -> None:
    """Convert, store, train three times; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    common = [
        *("-c", DEMO, "--batch-size", args.batch_size, "--device", args.device),
        *("--set", f"data.seq_len={args.seq_len}"),
    ]
    quiet = [
        *("--max-steps", args.steps, "--set", "evaluation.every=null"),
        *("--set", "runtime.save_every=null", "--set", "runtime.watch_every=1"),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), Path(name) / "store"
        nexus("convert", "-w", folder, "--init-strategy", "random")
        nexus(
            *("precompute", "-w", folder, *common, "--teacher-model", "embedded"),
            *("--num-steps", args.steps, "--output-dir", store),
        )
        results = {}
        for label, words in {
            "train": ["train"],
            "train --teacher-model": ["train", "--teacher-model", "embedded"],
            "train-offline": ["train-offline", "--precomputed-teacher", store],
        }.items():
            output = folder / label.replace(" ", "")
            nexus(*words, "-w", folder, *common, *quiet, "--output-dir", output)
            results[label] = measure(metrics(output))
    print(f"{'':24}steps/s   GiB  teacher  overhead")
    for label, found in results.items():
        print(
            f"{label:24}{found['steps_per_second']:7.3f}{found['peak_memory_gib']:6.2f}"
            f"{found['teacher_share']:8.1%}{found['overhead_share']:10.2%}"
        )
    if args.json:
        print(json.dumps({**versions(), **vars(args), "runs": results}))


if __name__ == "__main__":
    main()
