"""Runs of the commands as a user gives them, for benchmarks on the embedded model."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.yaml"


def nexus(*words: object) -> None:
    """Run one command; its output goes to stderr."""
    command = [sys.executable, "-m", "nexus_cli", *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a training run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of optimizer steps."""
    return [record for record in records if "loss" in record]


def held_out(records: list[dict[str, Any]], place: int = -1) -> dict[str, dict[str, float]]:
    """What an evaluation found, by source; the last one by default."""
    found: dict[str, dict[str, float]] = [r["eval"] for r in records if r.get("eval")][place]
    return found


def versions() -> dict[str, Any]:
    """Of what the figures depend on."""
    return {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
