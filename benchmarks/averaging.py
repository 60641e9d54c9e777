"""What SFA keeps of a first domain while a second one is learned.

python benchmarks/averaging.py [--steps 64] [--every 8] [--beta 0.25] [--json]

The embedded model learns domain A (tool calling); then the result learns domain B (general text, by
cross entropy alone and no KL, so that nothing else holds it), without SFA, with the paper's form
(anchor: the start, arXiv 2501.05559) and with the anchor of the previous merge. Held-out perplexity
of both; "kept" is the share of A's gain that is left.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from runs import DEMO, held_out, metrics, nexus, versions

A, B = "bundled-tool-calling", "bundled-general"
JUDGED = f"[{{name: {A}, split: held-out}}, {{name: {B}, split: held-out}}]"
FORMS = {"without": None, "anchor: start": "start", "anchor: previous": "previous"}


def train(
    student: Path | None, source: str, output: Path, args: argparse.Namespace, *extra: str
) -> list[dict[str, Any]]:
    """The records of one run on one source, by cross entropy alone."""
    own = [] if student is None else ["--student-model", student]
    sources = json.dumps([{"name": source, "loss": {"ce": 1.0, "kd": 0.0}}])
    settings = [
        f"data.sources={sources}",
        f"evaluation.every={args.steps}",
        f"evaluation.sequences={args.sequences}",
        f"evaluation.data.sources={JUDGED}",
        "evaluation.data.seq_len=512",
        "evaluation.keep_best=false",
        "runtime.save_every=null",
        *extra,
    ]
    nexus(
        *("train", "-c", DEMO, "-w", output.parent, *own, "--max-steps", args.steps),
        *("--device", args.device, "--output-dir", output),
        *(word for setting in settings for word in ("--set", setting)),
    )
    return metrics(output)


def losses(records: list[dict[str, Any]], place: int = -1) -> dict[str, float]:
    """Held-out loss of both domains."""
    return {name: found["loss"] for name, found in held_out(records, place).items()}


def main() -> None:
    """Learn A once, then B in three ways; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64, help="on each domain")
    parser.add_argument("--every", type=int, default=8, help="steps between merges")
    parser.add_argument("--beta", type=float, default=0.25, help="weight of the anchor")
    parser.add_argument("--sequences", type=int, default=48, help="held out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nexus("convert", "-w", folder, "--init-strategy", "random")
        first = train(None, A, folder / "a", args)
        before, learned = losses(first, 0), losses(first)
        student = folder / "a" / f"checkpoint-{args.steps}"
        results = {}
        for number, (form, anchor) in enumerate(FORMS.items()):
            extra = [f"averaging.every={args.every}", f"averaging.beta={args.beta}",
                     f"averaging.anchor={anchor}"] if anchor else []  # fmt: skip
            records = train(student, B, folder / f"b{number}", args, *extra)
            after = losses(records)
            moves = [record["l2"] for record in records if record.get("event") == "sfa"]
            results[form] = {
                "a": after[A],
                "b": after[B],
                "kept": (before[A] - after[A]) / (before[A] - learned[A]),
                "moves_l2": moves,
            }
    print(f"before: A {math.exp(before[A]):.2f}, B {math.exp(before[B]):.3f}; "
          f"after A: A {math.exp(learned[A]):.2f}, B {math.exp(learned[B]):.3f}")  # fmt: skip
    print(f"{'then B':20}{'A':>8}{'B':>8}{'kept of A':>11}")
    for form, found in results.items():
        print(
            f"{form:20}{math.exp(found['a']):8.2f}{math.exp(found['b']):8.3f}{found['kept']:10.1%}"
        )
    if args.json:
        figures = {"before": before, "after_a": learned, "then_b": results}
        print(json.dumps({**versions(), **vars(args), **figures}))


if __name__ == "__main__":
    main()
