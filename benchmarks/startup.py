"""How long `nexus --help` takes, as a whole process, beside Python's own start.

python benchmarks/startup.py [--runs 20] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python_start": [sys.executable, "-c", "pass"],
    "nexus_help": [sys.executable, "-m", "nexus_cli", "--help"],
}


def seconds(command: list[str]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Interleave the two commands and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for command in COMMANDS.values():
        seconds(command)  # the first run compiles and fills the page cache
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    result = {f"{name}_median_s": round(statistics.median(t), 3) for name, t in times.items()}
    result |= {f"{name}_min_s": round(min(t), 3) for name, t in times.items()}
    result["runs"] = args.runs
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
