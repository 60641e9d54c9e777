"""What the weights of the sources buy: the domain's gain against what general text loses.

python benchmarks/recipes.py [--steps 64] [--seeds 0 1] [--json]

The demo's training of the embedded model (configs/demo.yaml) by four recipes over as many tokens:

- default: cross entropy with a light KL on the domain, KL alone on general replay text;
- KL on domain text: cross entropy and a full KL on the domain, no replay text;
- light KL, no replay: the default's domain part alone;
- no KL: cross entropy on the domain and nothing else.

Held-out text of both kinds, from the same evaluation for all: perplexity, and KL to the original.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from runs import DEMO, held_out, metrics, nexus, versions

DOMAIN, GENERAL = "bundled-tool-calling", "bundled-general"
JUDGED = f"[{{name: {DOMAIN}, split: held-out}}, {{name: {GENERAL}, split: held-out}}]"
RECIPES: dict[str, list[dict[str, Any]]] = {
    "default": [
        {"name": DOMAIN, "weight": 0.6, "loss": {"ce": 1.0, "kd": 0.1}},
        {"name": GENERAL, "weight": 0.4, "loss": {"ce": 0.0, "kd": 1.0}},
    ],
    "KL on domain text": [{"name": DOMAIN, "loss": {"ce": 1.0, "kd": 1.0}}],
    "light KL, no replay": [{"name": DOMAIN, "loss": {"ce": 1.0, "kd": 0.1}}],
    "no KL": [{"name": DOMAIN, "loss": {"ce": 1.0, "kd": 0.0}}],
}


def train(recipe: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Held-out figures of one run, before and after."""
    output = folder / f"{list(RECIPES).index(recipe)}-{seed}"
    nexus(
        *("train", "-c", DEMO, "-w", folder, "--max-steps", args.steps, "--output-dir", output),
        *("--device", args.device, "--set", f"data.sources={json.dumps(RECIPES[recipe])}"),
        *("--set", f"data.seed={seed}", "--set", f"evaluation.every={args.steps}"),
        *("--set", f"evaluation.sequences={args.sequences}"),
        *("--set", f"evaluation.data.sources={JUDGED}", "--set", "evaluation.keep_best=false"),
        *("--set", "evaluation.data.seq_len=512", "--set", "runtime.save_every=null"),
    )
    records = metrics(output)
    before, after = held_out(records, 0), held_out(records)
    return {
        "domain_perplexity_before": before[DOMAIN]["perplexity"],
        "domain_perplexity": after[DOMAIN]["perplexity"],
        "general_perplexity_before": before[GENERAL]["perplexity"],
        "general_perplexity": after[GENERAL]["perplexity"],
        "general_kl": after[GENERAL]["kd"],
    }


def main() -> None:
    """Convert once, train each recipe with each seed; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=48, help="held out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nexus("convert", "-w", folder, "--init-strategy", "random")
        runs = {
            recipe: [train(recipe, seed, folder, args) for seed in args.seeds] for recipe in RECIPES
        }
    means = {
        recipe: {key: statistics.fmean(run[key] for run in found) for key in found[0]}
        for recipe, found in runs.items()
    }
    print(f"{'':22}domain perplexity  general perplexity  KL on general")
    for recipe, mean in means.items():
        print(
            f"{recipe:22}{mean['domain_perplexity_before']:8.2f} ->{mean['domain_perplexity']:6.2f}"
            f"{mean['general_perplexity_before']:11.3f} ->{mean['general_perplexity']:7.3f}"
            f"{mean['general_kl']:13.4f}"
        )
    if args.json:
        print(json.dumps({**versions(), **vars(args), "means": means, "runs": runs}))


if __name__ == "__main__":
    main()
