"""The student step, ours against stock transformers, each measurement in a fresh process.

python benchmarks/gpu/step.py [--shapes 16x1024 4x1024 1x1024] [--layers 8 4] [--optimizer adamw]
    [--model 20b|120b] [--memory-gib 76] [--skip-stock | --only-whole] [--quick] [--json]

First the layers alone (forward and backward of the mean square of the hidden states, equal numbers
of layers): stock eager, stock with ``torch.compile`` on each layer, the same with recompute, ours.
For the largest batch a second number of layers gives slopes, and from these the least recompute
with which all layers of stock fit. Then our whole step with all layers: self teacher, student,
cross entropy and KL, backward, clipping, optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from typing import Any

from children import Children, Result, parent_parser, ratio, shown, table
from machine import print_machine
from shapes import MODELS, BatchShape
from timing import GIB, rounded

# An fp32 master and two fp32 moments, as ours holds beside its bf16 form.
ADAMW_BYTES = 12

EAGER = {"mode": "eager"}
COMPILED = {"mode": "compiled"}
REDONE = {"mode": "compiled", "recompute": "all"}


@dataclass(frozen=True)
class Fit:
    """The least recompute with which a whole model of stock layers fits.

    Attributes:
        layers: of the whole model.
        recomputed: how many of them run again.
        ms: of its step.
        gib: of its peak.
    """

    layers: int
    recomputed: int
    ms: float
    gib: float


def least_recompute(
    kept: tuple[Result, Result],
    redone: tuple[Result, Result],
    *,
    layers: int,
    memory_gib: float,
    beside_gib: float,
) -> Fit | None:
    """Extrapolate two numbers of layers, with and without recompute, to a whole model.

    With slopes a layer ``t`` (ms) and ``m`` (GiB) and the peak ``M`` of all layers kept::

        n = ceil((M + beside - memory) / (m_kept - m_redone))
        ms = ms_kept(layers) + n * (t_redone - t_kept)

    Args:
        kept: results of the larger and the smaller number of layers, nothing recomputed.
        redone: likewise, every layer recomputed.
        layers: of the whole model.
        memory_gib: that all of it may take.
        beside_gib: what the measured steps did not hold: the optimizer's state.

    Returns:
        ``None`` where a measurement is missing, or not even full recompute fits.
    """
    if any("ms" not in result for result in (*kept, *redone)):
        return None
    (t_kept, m_kept), (t_redone, m_redone) = slope(kept), slope(redone)
    more = layers - kept[0]["layers"]
    gib = kept[0]["peak_gib"] + more * m_kept + beside_gib
    saved = m_kept - m_redone
    over = max(0.0, gib - memory_gib)
    if over and (saved <= 0 or over > layers * saved):
        return None
    count = math.ceil(over / saved) if over else 0
    ms = kept[0]["ms"] + more * t_kept + count * (t_redone - t_kept)
    return Fit(layers, count, ms, gib - count * saved)


def slope(pair: tuple[Result, Result]) -> tuple[float, float]:
    """Milliseconds and GiB that one more layer takes."""
    large, small = pair
    more = large["layers"] - small["layers"]
    return (large["ms"] - small["ms"]) / more, (large["peak_gib"] - small["peak_gib"]) / more


class Comparison:
    """All measurements of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.layers = [2] if args.quick else args.layers
        common = {"model": args.model, "skew": args.skew, "device": args.device}
        common |= {"repeats": 2 if args.quick else args.repeats}
        self.children = Children(timeout=args.timeout, common=common)
        self._ours = {
            "memory-gib": args.memory_gib,
            "optimizer": args.optimizer,
            "experts-backend": args.experts_backend,
        }

    def stock(self, who: str, shape: BatchShape, layers: int, how: dict[str, Any]) -> Result | None:
        """One child on stock transformers."""
        if self.args.skip_stock:
            return None
        return self.children.run(who, "stock_step.py", {"shape": shape, "layers": layers, **how})

    def ours(self, work: str, shape: BatchShape, layers: int) -> Result:
        """One child on our engine."""
        arguments = {"work": work, "shape": shape, "layers": layers, **self._ours}
        return self.children.run(f"ours, {work}", "ours_step.py", arguments)

    def layers_alone(self) -> tuple[str, list[str]]:
        """The table of equal numbers of layers, and what the slopes say."""
        rows, lines = [], []
        largest = max(self.args.shapes, key=lambda shape: shape.tokens)
        for shape in self.args.shapes:
            count = self.layers[0]
            eager = None if self.args.quick else self.stock("stock eager", shape, count, EAGER)
            compiled = self.stock("stock compiled", shape, count, COMPILED)
            redone = None
            if shape == largest:
                redone = self.stock("stock compiled, recompute", shape, count, REDONE)
            ours = self.ours("layers", shape, count)
            figures = [shown(r, "ms_a_layer") for r in (eager, compiled, redone, ours)]
            speed = [ratio(r, ours, "ms_a_layer") for r in (eager, compiled, redone)]
            memory = [shown(r, "peak_gib", 1) for r in (compiled, ours)]
            rows.append([str(shape), str(count), *figures, *speed, *memory])
            if shape == largest and compiled and redone and len(self.layers) > 1:
                lines += self.extrapolated(shape, compiled, redone)
        header = ["shape", "layers", "eager", "compiled", "recompute", "ours"]
        header += ["vs eager", "vs compiled", "vs recompute", "compiled GiB", "ours GiB"]
        return "ms a layer\n" + table(header, rows), lines

    def extrapolated(self, shape: BatchShape, compiled: Result, redone: Result) -> list[str]:
        """Stock with just enough recompute to fit, without an optimizer and with fp32 AdamW."""
        small, whole = self.layers[1], MODELS[self.args.model].layers
        kept = (compiled, self.stock("stock compiled", shape, small, COMPILED) or {})
        again = (redone, self.stock("stock compiled, recompute", shape, small, REDONE) or {})
        ours = self.ours("layers", shape, small)
        lines = [f"slopes at {shape}, {self.layers[0]} and {small} layers, ms and GiB a layer:"]
        pairs = {"compiled": kept, "recompute": again, "ours": (self.last_ours(shape), ours)}
        for name, pair in pairs.items():
            if all("ms" in result for result in pair):
                lines.append("  {:10} {:7.2f} {:6.2f}".format(name, *slope(pair)))
        for label, each in (("no optimizer", 0), ("fp32 AdamW", ADAMW_BYTES)):
            trained = compiled.get("trained", 0) / compiled.get("layers", 1) * whole
            beside = each * trained / GIB
            fit = least_recompute(
                kept, again, layers=whole, memory_gib=self.args.memory_gib, beside_gib=beside
            )
            self.children.results.append(
                {"who": f"stock compiled, least recompute, {label}", "shape": str(shape)}
                | ({"error": "does not fit"} if fit is None else vars(fit))
            )
            lines.append(f"stock compiled, all {whole} layers, {label}: " + told(fit))
        lines.append("  n = ceil((GiB of all kept + optimizer - memory) / (GiB kept - redone))")
        return lines

    def last_ours(self, shape: BatchShape) -> Result:
        """Our result of the larger number of layers."""
        found = [r for r in self.children.results if r["who"] == "ours, layers"]
        return next(r for r in found if (r["shape"], r["layers"]) == (str(shape), self.layers[0]))

    def whole(self) -> tuple[str, list[str]]:
        """The table of our whole step, and what each plan was."""
        rows, lines = [], []
        count = self.layers[0] if self.args.quick else MODELS[self.args.model].layers
        for shape in self.args.shapes:
            result = self.ours("whole", shape, count)
            phases = result.get("phases_ms", {})
            figures = [shown(result, "ms", 1), shown(result, "ms_a_layer")]
            figures += [f"{ms:,.1f}" for ms in phases.values()] or ["-"] * 5
            figures += [shown(result, key, 1) for key in ("peak_gib", "reserved_gib")]
            rows.append([str(shape), str(count), shown(result, "tokens_a_second", 0), *figures])
            lines += [f"{shape}: {line}" for line in result.get("plan", [result.get("error")])]
            lines += self.against_fits(shape, result)
        header = ["shape", "layers", "tokens/s", "ms", "ms a layer"]
        header += ["teacher", "forward", "head", "backward", "optimizer", "peak GiB", "reserved"]
        return f"our whole step, {self.args.optimizer}\n" + table(header, rows), lines

    def against_fits(self, shape: BatchShape, ours: Result) -> list[str]:
        """All layers of ours, in the whole step, against all layers of stock that fits."""
        if "ms_a_layer" not in ours:
            return []
        return [
            f"{shape}: {fit['ms'] / fit['layers'] / ours['ms_a_layer']:.2f}x {fit['who']}"
            for fit in self.children.results
            if "recomputed" in fit and fit["shape"] == str(shape)
        ]


def told(fit: Fit | None) -> str:
    """A line for people."""
    if fit is None:
        return "does not fit, or was not measured"
    return (
        f"{fit.recomputed} recomputed, {fit.ms / fit.layers:.2f} ms a layer, {fit.gib:.1f} GiB peak"
    )


def main() -> None:
    """Print tables; with --json, the last line is one object."""
    parser = parent_parser(__doc__)
    shapes = [BatchShape(batch, 1024) for batch in (16, 4, 1)]
    parser.add_argument("--shapes", type=BatchShape.parse, nargs="+", default=shapes)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[8, 4], help="compared; and a second for slopes"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--optimizer", choices=("adamw", "adamw-8bit"), default="adamw")
    parser.add_argument("--memory-gib", type=float, default=76.0)
    parser.add_argument("--experts-backend", default="auto")
    parser.add_argument("--only-whole", action="store_true", help="no layers alone, no stock")
    args = parser.parse_args()
    found = print_machine()
    comparison = Comparison(args)
    parts = [] if args.only_whole else [comparison.layers_alone()]
    parts.append(comparison.whole())
    for title, lines in parts:
        print("\n".join(["", title, *lines]))
    if args.json:
        print(json.dumps(rounded({"machine": found, "results": comparison.children.results})))


if __name__ == "__main__":
    main()
