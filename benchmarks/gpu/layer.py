"""One layer's routed experts, by backend: tokens x experts, uniform and skewed routing.

python benchmarks/gpu/layer.py [--tokens 1024 4096 16384 65536] [--experts 32 128]
    [--backends dequant fused bf16] [--routing uniform skewed] [--quick] [--json]

Two tables. *Block*: experts forward, and forward with backward
(gradients of input and scores), from token rows to token rows; TFLOP/s, and the share of the
roofline: the larger of operations at the rate of a big dense product and bytes at the rate of a
copy, both measured first in this run. *Products alone* ("routed pair": gate_up and down; and their
two input gradients), beside ``grouped_mm`` over bf16 weights and rows that are sorted already, and
the same with a decoding pass before it. Ours gathers the rows as part of the product.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from children import table
from machine import print_machine
from roofline import Ceilings, measure_ceilings, routed_work
from routed_case import TOP_K, Case, make_case, make_weights
from timing import median_ms, rounded
from torch import Tensor

from nexus_cli.core.kernels.mxfp4_decode import decode_into
from nexus_cli.core.kernels.rows import combine_rows
from nexus_cli.core.model.gpt_oss.engine.experts import (
    RoutedBlock,
    experts_backward,
    experts_forward,
)
from nexus_cli.core.model.gpt_oss.engine.products import (
    Bf16Products,
    DecodedWeights,
    DequantProducts,
    FusedProducts,
    PackedWeights,
    Products,
    TorchProducts,
)

SKEW = 1.0  # standard deviation that experts' biases add to logits of standard deviation 1


def block_forward(block: RoutedBlock, case: Case) -> tuple[Tensor, Tensor]:
    """The routed sum, and what the backward pass needs."""
    rows, gate_up = experts_forward(block, case.x, case.routing)
    summed = combine_rows(
        rows,
        case.routing,
        scores_TK=case.scores,
        experts_TK=case.experts,
        bias_EH=block.down_bias,
    )
    return summed, gate_up


def block_both(block: RoutedBlock, case: Case) -> tuple[Tensor, Tensor]:
    """Forward, then gradients of input and scores."""
    _, gate_up = block_forward(block, case)
    grads = experts_backward(block, case.grad, gate_up, case.scores, case.experts, case.routing)
    assert grads.rows_RH is not None
    return combine_rows(grads.rows_RH, case.routing), grads.scores_TK


class Timer:
    """Times calls on one device; what needs too much memory has no figure."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self._repeats = repeats

    def ms(self, call: Callable[[], object]) -> float | None:
        """The median, or ``None`` for lack of memory."""
        try:
            return median_ms(call, self.device, repeats=self._repeats, warm_up=2, hide_launch=True)
        except torch.OutOfMemoryError:
            return None


def time_block(timer: Timer, block: RoutedBlock, case: Case) -> dict[str, float | None]:
    """Forward, and forward with backward."""
    return {
        "forward_ms": timer.ms(lambda: block_forward(block, case)),
        "both_ms": timer.ms(lambda: block_both(block, case)),
    }


def time_products(timer: Timer, products: Products, case: Case) -> dict[str, float | None]:
    """The two products, and their two input gradients."""
    rows, hidden = len(case.routing.slot_R), case.x.shape[1]
    inner = torch.randn(rows, hidden, device=timer.device).bfloat16()
    outer = torch.randn(rows, 2 * hidden, device=timer.device).bfloat16()

    def pair() -> None:
        products.gate_up(case.x, case.routing)
        products.down(inner, case.routing)

    def gradients() -> None:
        products.grad_down(case.grad, case.routing)
        products.grad_gate_up(outer, case.routing)

    return {"pair_ms": timer.ms(pair), "pair_grad_ms": timer.ms(gradients)}


class Dense:
    """``grouped_mm`` over rows that are sorted already: the baseline of the products."""

    def __init__(self, weights: PackedWeights, decoded: DecodedWeights, *, decodes: bool) -> None:
        self._packed = (weights.gate_up, weights.down)
        self._dense = (decoded.gate_up_ENK, decoded.down_ENK)
        self._decodes = decodes

    def time(self, timer: Timer, case: Case) -> dict[str, float | None]:
        """As :func:`time_products`."""
        rows, hidden = len(case.routing.slot_R), case.x.shape[1]
        narrow = torch.randn(rows, hidden, device=timer.device).bfloat16()
        wide = torch.randn(rows, 2 * hidden, device=timer.device).bfloat16()
        ends = case.routing.offsets_E

        def pair() -> None:
            for which in (0, 1):
                F.grouped_mm(narrow, self._weight(which).transpose(-2, -1), offs=ends)

        def gradients() -> None:
            F.grouped_mm(narrow, self._weight(1), offs=ends)
            F.grouped_mm(wide, self._weight(0), offs=ends)

        return {"pair_ms": timer.ms(pair), "pair_grad_ms": timer.ms(gradients)}

    def _weight(self, which: int) -> Tensor:
        if self._decodes:  # into the same memory: the values are the same too
            decode_into(*self._packed[which], self._dense[which])
        return self._dense[which]


def cases(args: argparse.Namespace) -> Iterator[tuple[int, str, int]]:
    """Experts, routing and tokens of every measurement."""
    for experts in args.experts:
        for routing in args.routing:
            for tokens in args.tokens:
                yield experts, routing, tokens


def measure(args: argparse.Namespace, ceilings: Ceilings) -> list[dict[str, Any]]:
    """One record for each case and backend."""
    records: list[dict[str, Any]] = []
    weights: PackedWeights | None = None
    for experts, routing, tokens in cases(args):
        if weights is None or len(weights.gate_up_blocks) != experts:
            weights = decoded = backends = None  # freed before the next are made
            weights = make_weights(experts, args.hidden, args.device)
            decoded = DecodedWeights.of(weights)
            backends = make_backends(args.backends, weights, decoded)
        skew = SKEW if routing == "skewed" else 0.0
        case = make_case(tokens, experts, args.hidden, skew, args.device)
        counts = case.counts
        asked = {"experts": experts, "routing": routing, "tokens": tokens}
        asked |= {"fullest_over_mean": max(counts) * len(counts) / sum(counts)}
        used = sum(count > 0 for count in counts)
        work = routed_work(tokens, TOP_K, args.hidden, used)
        timer = Timer(args.device, args.repeats if tokens <= 4096 else max(2, args.repeats // 2))
        for name, products in backends.items():
            first = (args.experts[0], args.routing[0], args.tokens[0])
            if name == "torch" and (experts, routing, tokens) != first:
                continue  # slow, and there only to be the oracle
            figures = time_block(timer, RoutedBlock.of(weights, products), case)
            figures |= time_products(timer, products, case)
            records.append({"backend": name, **asked, **figures, **ceilings.shares(work, figures)})
            sys.stderr.write(f"  {rounded(records[-1])}\n")
        for name, decodes in (("grouped_mm", False), ("decode + grouped_mm", True)):
            if args.device.type == "cuda":
                dense = Dense(weights, decoded, decodes=decodes)
                figures = dense.time(timer, case)
                records.append({"backend": name, **asked, **figures})
    return records


def make_backends(
    names: list[str], weights: PackedWeights, decoded: DecodedWeights
) -> dict[str, Products]:
    """Products by name."""
    makers: dict[str, Callable[[], Products]] = {
        "torch": lambda: TorchProducts(weights),
        "dequant": lambda: DequantProducts(weights),
        "fused": lambda: FusedProducts(weights),
        "bf16": lambda: Bf16Products(decoded),
    }
    return {name: makers[name]() for name in names}


def tables(records: list[dict[str, Any]]) -> str:
    """Blocks, then products."""
    kinds = {"block": ("forward", "both"), "products alone": ("pair", "pair_grad")}
    told = []
    for title, parts in kinds.items():
        keys = [f"{part}_{unit}" for unit in ("ms", "tflops", "share") for part in parts]
        rows = [
            [str(r["experts"]), r["routing"], f"{r['tokens']:,}", r["backend"]]
            + [f"{r[key]:.3g}" if r.get(key) is not None else "-" for key in keys]
            for r in records
            if keys[0] in r
        ]
        told.append(f"{title}\n" + table(["experts", "routing", "tokens", "backend", *keys], rows))
    return "\n\n".join(told)


def main() -> None:
    """Print tables; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--hidden", type=int, default=2880, help="also the experts' width")
    known = ("torch", "dequant", "fused", "bf16")
    parser.add_argument("--backends", nargs="+", choices=known, default=list(known))
    routings = ("uniform", "skewed")
    parser.add_argument("--routing", nargs="+", choices=routings, default=list(routings))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--quick", action="store_true", help="few cases and repeats: a trial")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.experts, args.routing = [1024], [32], ["uniform"]
        args.repeats = 3
    found = print_machine()
    ceilings = measure_ceilings(args.device)
    print(ceilings)
    records = measure(args, ceilings)
    print("\n" + tables(records))
    if args.json:
        rates = {"flops": ceilings.flops, "bytes": ceilings.bytes}
        print(json.dumps(rounded({"machine": found, "ceilings": rates, "results": records})))


if __name__ == "__main__":
    main()
