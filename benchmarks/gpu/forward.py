"""The forward pass, ours against stock transformers, each measurement in a fresh process.

python benchmarks/gpu/forward.py [--shapes 16x1024] [--layers 8 24] [--model 20b|120b]
    [--skip-stock] [--no-collect] [--quick] [--json]

Hidden states alone; the head with top-32 and log-sum-exp; then what ``collect`` does: a million
tokens in batches of like length through the model, the routers' moments added up on the device.
"""

from __future__ import annotations

import argparse
import json

from children import Children, Result, parent_parser, ratio, shown, table
from machine import print_machine
from shapes import BatchShape
from timing import rounded


def compare(args: argparse.Namespace, children: Children) -> str:
    """The table of stock and ours, for every batch shape and number of layers."""
    rows = []
    for shape in args.shapes:
        for place, layers in enumerate(args.layers):
            asked = {"shape": shape, "layers": layers}
            eager: Result | None = None
            compiled: Result | None = None
            if not args.skip_stock:
                if place == 0 and not args.quick:
                    eager = children.run("stock eager", "stock_forward.py", asked)
                compiled = children.run(
                    "stock compiled", "stock_forward.py", {**asked, "mode": "compiled"}
                )
            ours = children.run(
                "ours", "ours_forward.py", {**asked, "experts-backend": args.experts_backend}
            )
            for name, result in (("eager", eager), ("compiled", compiled), ("ours", ours)):
                if result is None:
                    continue
                row = [str(shape), str(layers), name, shown(result, "ms_a_layer")]
                row += [shown(result, "head_ms", 1), shown(result, "tokens_a_second", 0)]
                row += [shown(result, "tokens_a_second_with_head", 0), shown(result, "peak_gib", 1)]
                if name == "compiled":
                    row += [ratio(result, ours, "ms_a_layer"), ratio(result, ours, "head_ms")]
                    row += [gain(ours, result, "tokens_a_second_with_head")]
                rows.append(row + [""] * (11 - len(row)))
    header = ["shape", "layers", "", "ms a layer", "head ms", "tokens/s", "with head", "GiB"]
    return table([*header, "ours: hidden", "head", "both"], rows)


def gain(ours: Result, stock: Result, key: str) -> str:
    """How many times more a second ours does."""
    return ratio(ours, stock, key)


def collect(args: argparse.Namespace, children: Children) -> str:
    """One line about a million tokens."""
    asked = {"experts-backend": args.experts_backend}
    if args.quick:
        asked |= {"layers": args.layers[0], "tokens": 100_000}
    if args.model == "tiny":
        asked |= {"tokens": 2_000}
    result = children.run("ours, collect", "ours_collect.py", asked)
    if "error" in result:
        return f"collect: {result['error']}"
    return (
        f"collect: {result['tokens']:,} tokens ({result['padded_tokens']:,} with padding) in "
        f"{result['seconds']:.2f} s: forward {result['forward_s']:.2f}, moments "
        f"{result['accumulator_s']:.2f}, all else {result['rest_s']:.2f}"
    )


def main() -> None:
    """Print a table and a line; with --json, the last line is one object."""
    parser = parent_parser(__doc__)
    parser.add_argument(
        "--shapes", type=BatchShape.parse, nargs="+", default=[BatchShape(16, 1024)]
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24], help="eager: the first")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--experts-backend", default="auto")
    parser.add_argument("--no-collect", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.repeats = [2], 3
    found = print_machine()
    common = {"model": args.model, "skew": args.skew, "device": args.device}
    children = Children(timeout=args.timeout, common={**common, "repeats": args.repeats})
    print("\n" + compare(args, children))
    if not args.no_collect:
        print(collect(args, children))
    if args.json:
        print(json.dumps(rounded({"machine": found, "results": children.results})))


if __name__ == "__main__":
    main()
