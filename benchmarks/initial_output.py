"""What a fresh shared expert says, beside what the layer's routed experts say to the same tokens.

python benchmarks/initial_output.py [--tokens 20000] [--top-k 24] [--strategies ...] [--json]

The embedded model over held-out general text and tool calls, before any training. ``cosine`` is
that of the shared expert's output S(x) with the routed sum MoE(x), over all tokens together;
``size`` the length of S(x) relative to MoE(x). Means over the layers, and the least and the most.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from initialisation import STRATEGIES, select
from nexus_cli import embedded
from nexus_cli.core.model.gpt_oss.loading import load_model, load_tokenizer
from runs import nexus, versions

LONGEST = 512
FILES = ("general.held-out.jsonl.gz", "tool-calling.held-out.jsonl.gz")


def texts(tokens: int) -> list[Tensor]:
    """Token ids ``[1, S]`` of the first held-out documents of both kinds, half of them each."""
    tokenizer, found = load_tokenizer(embedded.MODEL_DIR), []
    for name in FILES:
        left = tokens // 2
        with gzip.open(embedded.DATA_DIR / name, "rt") as file:
            for row in map(json.loads, file):
                text = row.get("text") or tokenizer.apply_chat_template(
                    row["messages"], tools=row.get("tools"), tokenize=False
                )
                found.append(tokenizer(text, return_tensors="pt").input_ids[:, :LONGEST])
                left -= found[-1].shape[1]
                if left <= 0:
                    break
    return found


@torch.no_grad()
def layers_of(model: Any, documents: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each layer's input ``x [T, H]`` and routed sum ``MoE(x) [T, H]``, without first tokens."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.model.layers]
    for layer, kept in zip(model.model.layers, seen, strict=True):
        layer.mlp.experts.register_forward_hook(
            lambda _, inputs, output, kept=kept: kept.append((inputs[0][1:], output[1:]))
        )
    for ids in documents:
        model.model(input_ids=ids, use_cache=False)
    return [tuple(map(torch.cat, zip(*kept, strict=True))) for kept in seen]  # type: ignore[misc]


@torch.no_grad()
def compare(folder: Path, layers: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """Cosine and relative size of every layer's shared expert in the model at ``folder``."""
    model = load_model(folder, dtype=torch.float32)
    found: dict[str, list[float]] = {"cosine": [], "size": []}
    for layer, (x, routed) in zip(model.model.layers, layers, strict=True):
        shared = layer.mlp.shared_expert(x)  # its gate is 1
        both = (shared * routed).sum() / shared.norm() / routed.norm()
        found["cosine"].append(both.item())
        found["size"].append((shared.norm() / routed.norm()).item())
    return found


def main() -> None:
    """Print a line a strategy; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--tokens", type=int, default=20_000, help="as many for the statistics")
    parser.add_argument("--top-k", type=int, default=24, help="experts chosen in every layer")
    parser.add_argument("--device", default="cpu", help="of the statistics")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    layers = layers_of(load_model(embedded.MODEL_DIR, dtype=torch.float32), texts(args.tokens))
    found = {}
    with tempfile.TemporaryDirectory() as name:
        select(Path(name), args)
        for strategy in args.strategies:
            folder = Path(name) / strategy
            nexus(
                *("convert", "-w", folder / "ws", "--pca-stats", Path(name) / "pca/pca_stats.json"),
                *("--init-strategy", strategy, "--output", folder / "model"),
                *("--start", "scaled", "--output-scale", 1),
            )
            found[strategy] = compare(folder / "model", layers)
    print("| strategy | cosine | least, most | size |\n| --- | --- | --- | --- |")
    for strategy, each in sorted(found.items(), key=lambda e: -statistics.fmean(e[1]["cosine"])):
        cosine, size = statistics.fmean(each["cosine"]), statistics.fmean(each["size"])
        span = f"{min(each['cosine']):.2f}, {max(each['cosine']):.2f}"
        print(f"| {strategy} | {cosine:.3f} | {span} | {size:.2f} |")
    if args.json:
        print(json.dumps({**versions(), **vars(args), "layers": found}))


if __name__ == "__main__":
    main()
