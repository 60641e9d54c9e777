"""Race the tiles of the fused MXFP4 products on this GPU: the figures behind the kernel's tables.

python benchmarks/gpu/tune_mxfp4_matmul.py [--experts 32 128] [--tokens 1024 4096 16384] [--json]

All four products of the routed block, beside decoding alone, ``grouped_mm`` over decoded weights
and sorted rows (ours gathers on the way), and the sum of the two. Routing is a random top 4, hence
uneven. Results are compared with ``grouped_mm``'s; a relative error from 1e-2 up is called wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import print_machine
from routed_case import TOP_K, Case, make_case, make_weights
from timing import emit, median_ms
from torch import Tensor

from nexus_cli.core.kernels.mxfp4_decode import decode_into
from nexus_cli.core.kernels.triton import mxfp4_matmul as kernels
from nexus_cli.core.kernels.triton.mxfp4_matmul import Tiles
from nexus_cli.core.model.gpt_oss.engine.products import DecodedWeights

WRONG = 1e-2
# rows, features, warps, stages, swapped; the depth is 64
SIZES = (
    (32, 128, 4, 3, True), (32, 128, 4, 4, True), (32, 128, 4, 5, True), (32, 64, 4, 4, True),
    (64, 128, 4, 3, True), (64, 128, 4, 4, True), (64, 128, 8, 3, True), (64, 128, 8, 4, True),
    (64, 128, 4, 3, False), (64, 128, 4, 4, False), (64, 256, 8, 3, False), (64, 256, 8, 3, True),
    (128, 128, 4, 3, True), (128, 128, 8, 3, True), (128, 128, 8, 4, True),
    (128, 128, 4, 3, False), (128, 128, 8, 3, False), (128, 128, 8, 4, False),
    (128, 256, 8, 3, True), (128, 256, 8, 3, False),
    (256, 128, 8, 3, True), (256, 128, 8, 3, False),
)  # fmt: skip
CANDIDATES = [Tiles(r, f, 64, warps, stages, swapped) for r, f, warps, stages, swapped in SIZES]


class Matrix(NamedTuple):
    """A packed weight, its scales in the kernels' order, and its decoded bf16 form."""

    blocks: Tensor
    scales: Tensor
    dense: Tensor

    def decode(self) -> None:
        """Write the decoded form again; the values are the same."""
        decode_into(*self)


class Product:
    """One of the four, with random rows."""

    def __init__(self, name: str, matrix: Matrix, case: Case) -> None:
        self.name = name
        self.transposed = name.startswith("grad")
        gathered = name in ("gate_up", "grad_down")
        features, inputs = matrix.dense.shape[1:]
        count = len(case.x) if gathered else len(case.routing.slot_R)
        width = features if self.transposed else inputs
        self._x = torch.randn(count, width, device=case.x.device).bfloat16()
        self._index = case.routing.token_R if gathered else None
        self._matrix, self._offsets = matrix, case.routing.offsets_E

    def fused(self, tiles: Tiles) -> Tensor:
        """By our kernel."""
        packed = self._matrix.blocks, self._matrix.scales
        given = self._x, *packed, self._offsets, self._index
        return kernels.matmul_rows(
            *given, transposed=self.transposed, small_scales=True, tiles=tiles
        )

    def dense(self) -> Callable[[], Tensor]:
        """``grouped_mm`` over the decoded weights, its rows gathered already."""
        weight = self._matrix.dense
        weight = weight if self.transposed else weight.transpose(-2, -1)
        rows = self._x if self._index is None else self._x.index_select(0, self._index)
        return lambda: F.grouped_mm(rows, weight, offs=self._offsets)


def candidates(rows_per_expert: float) -> list[Tiles]:
    """What may be worth a race at this average."""
    if rows_per_expert <= 40:
        return [tiles for tiles in CANDIDATES if tiles.rows <= 64]
    least = 64 if rows_per_expert <= 200 else 128
    return [tiles for tiles in CANDIDATES if tiles.rows >= least]


def compile_all(product: Product, racing: list[Tiles]) -> dict[Tiles, str]:
    """Compile side by side: the compiler leaves Python's lock for long. Returns what failed."""

    def compile_one(tiles: Tiles) -> str:
        try:
            product.fused(tiles)
        except Exception as error:  # noqa: BLE001  # reported: the race goes on without it
            return f"{type(error).__name__}: {str(error)[:160]}"
        return ""

    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(compile_one, racing))
    torch.cuda.synchronize()
    return {tiles: error for tiles, error in zip(racing, errors, strict=True) if error}


def race(product: Product, matrix: Matrix, racing: list[Tiles], repeats: int) -> dict[str, Any]:
    """Time all candidates and what they must beat."""
    ms = partial(
        median_ms, device=torch.device("cuda"), repeats=repeats, warm_up=2, hide_launch=True
    )
    failed = compile_all(product, racing)
    for tiles, error in failed.items():
        print(f"  {product.name}: {describe(tiles)} failed, {error}", flush=True)
    decode_ms, dense = ms(matrix.decode), product.dense()
    dense_ms, expected = ms(dense), dense().float()
    found = []
    for tiles in racing:
        if tiles not in failed:
            error = float((product.fused(tiles).float() - expected).norm() / expected.norm())
            spent = ms(partial(product.fused, tiles))
            found.append({"tiles": describe(tiles), "ms": spent, "error": error})
    return {
        "product": product.name,
        "decode_ms": decode_ms,
        "grouped_mm_ms": dense_ms,
        "sum_ms": decode_ms + dense_ms,
        "fused": sorted(found, key=lambda each: each["ms"]),
    }


def describe(tiles: Tiles) -> str:
    """Such as ``64x128x64, 4 warps, 3 stages, swapped``."""
    size, order = tiles[:3], "swapped" if tiles.swapped else "straight"
    return f"{'x'.join(map(str, size))}, {tiles.warps} warps, {tiles.stages} stages, {order}"


def show(result: dict[str, Any]) -> None:
    """What must be beaten, the best three, and whatever is wrong."""
    print(
        f"{result['experts']} experts, {result['tokens']:,} tokens, {result['product']}: "
        f"decode {result['decode_ms']:.3f} ms, grouped_mm {result['grouped_mm_ms']:.3f}, "
        f"sum {result['sum_ms']:.3f}"
    )
    for each in result["fused"][:3]:
        print(f"  {each['ms']:.3f} ms, error {each['error']:.1e}: {each['tiles']}")
    for each in result["fused"]:
        if not each["error"] < WRONG:
            print(f"  WRONG, error {each['error']:.1e}: {each['tiles']}")
    sys.stdout.flush()


def measure(experts: int, tokens: list[int], hidden: int, repeats: int) -> list[dict[str, Any]]:
    """All products at one number of experts."""
    device, results = torch.device("cuda"), []
    weights = make_weights(experts, hidden, device)
    decoded = DecodedWeights.of(weights)
    gate_up = Matrix(*weights.gate_up, decoded.gate_up_ENK)
    down = Matrix(*weights.down, decoded.down_ENK)
    named = {"gate_up": gate_up, "down": down, "grad_down": down, "grad_gate_up": gate_up}
    for count in tokens:
        case = make_case(count, experts, hidden, 0.0, device)
        for name, matrix in named.items():
            product, racing = Product(name, matrix, case), candidates(count * TOP_K / experts)
            result = race(product, matrix, racing, repeats)
            results.append({"experts": experts, "tokens": count, **result})
            show(results[-1])
    return results


def main() -> int:
    """Race product by product; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--hidden", type=int, default=2880, help="also the experts' width")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("a CUDA device is needed", file=sys.stderr)
        return 2
    found, start, results = print_machine(), time.perf_counter(), []
    for experts in args.experts:
        results += measure(experts, args.tokens, args.hidden, args.repeats)
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)
    if args.json:
        emit({"machine": found, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
