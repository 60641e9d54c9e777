"""The demo in a fresh workspace: seconds of each stage, and what the report says.

python benchmarks/demo.py [--config configs/demo.yaml] [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("collect", "pca", "convert", "train", "precompute", "train-offline", "validate", "plot")


def run_stage(stage: str, workspace: Path, config: Path) -> float:
    """Run one command as a user does; its wall time."""
    command = [sys.executable, "-m", "nexus_cli", stage, "-w", str(workspace), "-c", str(config)]
    if stage == "validate":
        command += ["--model", str(workspace / "train")]
    if stage == "train-offline":
        command += ["--set", "max_steps=null"]  # one pass over the store
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def main() -> None:
    """Run the stages in order and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        took = {stage: round(run_stage(stage, workspace, args.config), 1) for stage in STAGES}
        report = json.loads((workspace / "validate" / "report.json").read_text())
    result = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "seconds": took | {"all": round(sum(took.values()), 1)},
        "summary": report["summary"],
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
