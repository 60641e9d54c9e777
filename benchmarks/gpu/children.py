"""One measurement in a process of its own, and what the parent makes of its last line.

A fresh process for every shape: compiled code, autotuning and the allocator's blocks of one shape
must not help or hurt another.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from shapes import MODELS, BatchShape
from timing import emit

HERE = Path(__file__).parent
Result = dict[str, Any]


def child_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that all children take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="20b")
    parser.add_argument("--shape", type=BatchShape.parse, default=BatchShape(16, 1024))
    parser.add_argument("--layers", type=int, help="all of the model's by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skew", type=float, default=0.0, help="of the router's biases")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    return parser


def run_as_child(parser: argparse.ArgumentParser, measure: Callable[..., Result]) -> None:
    """Measure and print one JSON line; running out of memory is a result too."""
    args = parser.parse_args()
    if args.layers is None:
        args.layers = MODELS[args.model].layers
    asked = {"model": args.model, "shape": str(args.shape), "layers": args.layers}
    try:
        result = measure(args)
    except torch.OutOfMemoryError as error:
        message = str(error).partition(". GPU ")[0]
        emit({**asked, "error": f"out of memory: {message}"})
        sys.exit(1)
    emit({**asked, **result})


def run_child(script: str, *arguments: object, timeout: float) -> Result:
    """Run ``script`` of this folder; its last line as an object, or one with ``error``."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout:.0f} s"}
    try:
        result = json.loads(done.stdout.strip().rpartition("\n")[2])
    except json.JSONDecodeError:
        result = None
    if isinstance(result, dict):
        return result
    sys.stderr.write(done.stderr[-4000:])
    last = done.stderr.strip().rpartition("\n")[2]
    return {"error": f"{script} ended with {done.returncode}: {last[:200]}"}


class Children:
    """Runs children one after another, tells of each, and remembers all results."""

    def __init__(self, *, timeout: float, common: Mapping[str, object]) -> None:
        self._timeout = timeout
        self._common = [part for key, value in common.items() for part in (f"--{key}", value)]
        self.results: list[Result] = []

    def run(self, who: str, script: str, arguments: Mapping[str, object]) -> Result:
        """Run one; ``who`` names it in tables."""
        own = [part for key, value in arguments.items() for part in (f"--{key}", value)]
        result = run_child(script, *self._common, *own, timeout=self._timeout)
        result = {"who": who, **{k: str(v) for k, v in arguments.items()}, **result}
        shown = {k: v for k, v in result.items() if not isinstance(v, list | dict)}
        sys.stderr.write("  " + ", ".join(f"{k} {v}" for k, v in shown.items()) + "\n")
        sys.stderr.flush()
        self.results.append(result)
        return result


def parent_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that all parents take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="20b")
    parser.add_argument("--skew", type=float, default=0.0, help="of the router's biases")
    parser.add_argument("--skip-stock", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few layers and repeats: a trial")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a child")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    return parser


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of text, a header and a rule."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
             for row in [header, ["-" * width for width in widths], *rows]]  # fmt: skip
    return "\n".join(lines)


def shown(result: Result | None, key: str, digits: int = 2) -> str:
    """A figure for a table; what went wrong, shortly, where there is none."""
    if result is None:
        return "-"
    if "error" in result:
        return "no memory" if "memory" in result["error"] else "failed"
    value = result.get(key)
    return "-" if value is None else f"{value:,.{digits}f}"


def ratio(before: Result | None, after: Result | None, key: str) -> str:
    """How many times less ``after`` takes."""
    if not before or not after or key not in before or key not in after:
        return "-"
    return f"{before[key] / after[key]:.2f}x"
