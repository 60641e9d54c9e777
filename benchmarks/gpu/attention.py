"""Attention with sinks: our kernels against flex attention, eager attention and plain flash.

One layer of GPT-OSS's shape (64 query heads, 8 key heads, head size 64), full and with a window of
128, forward and forward with backward. TFLOP/s count the pairs that are seen, 4 products of 64 a
pair forward and 10 backward. ``plain flash`` has no sinks, no window and one document a row: it
says what the card gives. ``--tune`` times tiles of every kernel instead.

    python benchmarks/gpu/attention.py [--json] [--documents 4] [--shape 16x1024] [--tune]
"""

from __future__ import annotations

import argparse
import multiprocessing
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from machine import print_machine
from shapes import BatchShape
from timing import emit, median_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nexus_cli.core.kernels.attention import (
    attention_starts,
    last_query,
    sink_attention,
    sink_attention_backward,
    sink_attention_backward_torch,
    sink_attention_torch,
)

HEADS = {"num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "scale": 64**-0.5}
SPLIT = (64, 8, 8)
WINDOW = 128
SHAPES = ("16x1024", "4x1024", "1x1024", "2x8192")
TUNED_SHAPES = ("16x1024", "1x1024")
EAGER_LENGTH = 1024  # one tensor of logits is 2 GiB at 16 x 1024
Step = Callable[[], object]


@dataclass(frozen=True)
class Inputs:
    """Random tensors of one shape and window."""

    qkv: Tensor
    grad: Tensor
    sinks: Tensor
    start: Tensor
    last: Tensor
    window: int | None

    @property
    def pairs(self) -> int:
        """Of queries and keys that are seen, over all heads."""
        index = torch.arange(self.start.shape[1], device=self.start.device)
        return int((index - self.start + 1).sum()) * HEADS["num_heads"]


def draw(shape: BatchShape, window: int | None, documents: int) -> Inputs:
    """Rows cut at random into ``documents``."""
    torch.manual_seed(0)
    batch, seq = shape.batch, shape.length
    positions = torch.arange(seq, device="cuda").repeat(batch, 1)
    for row in positions:
        for cut in torch.randint(1, seq, (documents - 1,)).sort().values.tolist():
            row[cut:] = torch.arange(seq - cut, device="cuda")
    start = attention_starts(positions, window)
    return Inputs(
        torch.randn(batch, seq, 80 * 64, device="cuda", dtype=torch.bfloat16),
        torch.randn(batch, seq, 64 * 64, device="cuda", dtype=torch.bfloat16),
        torch.randn(64, device="cuda", dtype=torch.bfloat16),
        start,
        last_query(start),
        window,
    )


def ours(inputs: Inputs) -> tuple[Step, Step]:
    """Forward, and forward with backward."""

    def forward() -> tuple[Tensor, Tensor]:
        return sink_attention(inputs.qkv, inputs.sinks, inputs.start, window=inputs.window, **HEADS)

    def both() -> Tensor:
        out, lse = forward()
        return sink_attention_backward(
            inputs.grad,
            inputs.qkv,
            out,
            lse,
            inputs.start,
            inputs.last,
            window=inputs.window,
            **HEADS,
        )

    return forward, both


def differentiated(
    inputs: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[Step, Step]:
    """The same two of a function of q, k and v ``[B, heads, S, D]`` that autograd goes through."""
    q, k, v = inputs.qkv.unflatten(-1, (-1, 64)).transpose(1, 2).split(SPLIT, dim=1)
    leaves = [part.contiguous().requires_grad_() for part in (q, k, v)]
    grad = inputs.grad.unflatten(-1, (-1, 64)).transpose(1, 2).contiguous()

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, grad)

    return forward, both


def flex(inputs: Inputs) -> tuple[Step, Step]:
    """Compiled flex attention, renormalised with the sinks in float32."""
    torch._dynamo.reset()
    start = inputs.start

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del h
        return (key >= start[b, query]) & (key <= query)

    batch, seq = start.shape
    mask = create_block_mask(seen, batch, None, seq, seq, device="cuda")

    @torch.compile(dynamic=False)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flex_attention(
            q, k, v, block_mask=mask, scale=HEADS["scale"], enable_gqa=True, return_lse=True
        )
        kept = torch.sigmoid(lse.float() - inputs.sinks.float()[None, :, None])
        return (out.float() * kept[..., None]).to(out.dtype)

    return differentiated(inputs, attend)


def eager(inputs: Inputs) -> tuple[Step, Step]:
    """The attention of transformers that GPT-OSS trains with by default."""
    from transformers.models.gpt_oss.modeling_gpt_oss import (  # noqa: PLC0415
        eager_attention_forward,
    )

    index = torch.arange(inputs.start.shape[1], device="cuda")
    hidden = (index < inputs.start[..., None]) | (index > index[:, None])
    mask = torch.zeros(hidden.shape, device="cuda", dtype=torch.bfloat16)
    mask = mask.masked_fill_(hidden, torch.finfo(torch.bfloat16).min)[:, None]
    module = types.SimpleNamespace(sinks=inputs.sinks, num_key_value_groups=8, training=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = eager_attention_forward(module, q, k, v, mask, scaling=HEADS["scale"])
        return out.transpose(1, 2)

    return differentiated(inputs, attend)


def plain_flash(inputs: Inputs) -> tuple[Step, Step]:
    """Flash attention as torch has it: causal, no sinks, no window, no documents."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return differentiated(inputs, attend)


WAYS: dict[str, Callable[[Inputs], tuple[Step, Step]]] = {
    "ours": ours,
    "flex": flex,
    "eager": eager,
    "plain flash": plain_flash,
}


def compare(shape: BatchShape, window: int | None, documents: int, repeats: int) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of every way that fits."""
    inputs = draw(shape, window, documents)
    result: dict[str, Any] = {"shape": str(shape), "window": window, "documents": documents}
    result["error"] = errors(inputs) if shape.length <= EAGER_LENGTH else None
    for name, way in WAYS.items():
        if name == "eager" and shape.length > EAGER_LENGTH:
            continue
        if name == "plain flash" and window is not None:
            continue
        pairs = inputs.pairs
        if name == "plain flash":
            pairs = shape.batch * 64 * (shape.length * (shape.length + 1) // 2)
        try:
            forward, both = way(inputs)
            forward_ms = median_ms(forward, inputs.qkv.device, repeats=repeats, hide_launch=True)
            both_ms = median_ms(both, inputs.qkv.device, repeats=repeats, hide_launch=True)
        except torch.OutOfMemoryError:
            result[name] = {"error": "out of memory"}
            continue
        finally:
            forward = both = None
            torch.cuda.empty_cache()
        backward_ms = both_ms - forward_ms
        result[name] = {
            "forward_ms": forward_ms,
            "both_ms": both_ms,
            "forward_tflops": 4 * 64 * pairs / forward_ms / 1e9,
            "backward_tflops": 10 * 64 * pairs / backward_ms / 1e9,
        }
    return result


def errors(inputs: Inputs) -> dict[str, float]:
    """Relative, of output and gradient of the first row, against float32 with dense logits."""
    qkv, grad, start = inputs.qkv[:1], inputs.grad[:1], inputs.start[:1]
    first = Inputs(qkv, grad, inputs.sinks, start, inputs.last[:1], inputs.window)
    forward, both = ours(first)
    exact, lse = sink_attention_torch(qkv.float(), inputs.sinks, start, **HEADS)
    back = sink_attention_backward_torch(grad.float(), qkv.float(), exact, lse, start, **HEADS)
    return {
        "out": float((forward()[0] - exact).norm() / exact.norm()),  # type: ignore[index]
        "grad": float((both() - back).norm() / back.norm()),  # type: ignore[operator]
    }


def candidates() -> Iterator[tuple[str, Any]]:
    """Kernel and tile."""
    from nexus_cli.core.kernels.triton.attention import Tile  # noqa: PLC0415

    rows = ((1, 64, 4), (2, 32, 4), (1, 128, 4), (2, 64, 4), (4, 32, 4), (1, 128, 8), (2, 64, 8))
    rows += ((4, 32, 8), (4, 64, 8))
    for heads, positions, warps in rows:
        for keys in (32, 64, 128):
            for stages in (2, 3):
                if keys * stages <= 256:
                    yield "forward", Tile(heads, positions, keys, warps, stages)
                if keys <= 64 and heads * positions <= 128:
                    yield "query", Tile(heads, positions, keys, warps, stages)
    for positions, keys, warps in ((32, 64, 4), (64, 64, 4), (32, 128, 8), (64, 128, 8)):
        for stages in (2, 3, 4):
            yield "key", Tile(1, positions, keys, warps, stages)


def launcher(kernel: str, tile: Any, inputs: Inputs) -> Step:
    """One launch of a kernel with a tile."""
    from nexus_cli.core.kernels.triton import attention_backward, attention_keys  # noqa: PLC0415
    from nexus_cli.core.kernels.triton.attention import attention_forward  # noqa: PLC0415

    qkv, grad, window = inputs.qkv, inputs.grad, inputs.window
    if kernel == "forward":
        return lambda: attention_forward(
            qkv, inputs.sinks, inputs.start, window=window, tile=tile, **HEADS
        )
    sizes = {"HQ": 64, "HKV": 8, "D": 64}
    buffer = torch.empty_like(qkv)
    batch, seq, _ = qkv.shape
    if kernel == "query":
        lse = torch.zeros(batch, 64, seq, device="cuda")
        tensors = (grad, qkv, grad, lse, inputs.start)
        return lambda: attention_backward.launch_queries(
            tensors, buffer, sizes, HEADS["scale"], tile
        )
    rows = torch.zeros(2, batch, 64, -(-seq // 128) * 128, device="cuda")
    tensors = (grad, qkv, rows, inputs.last)
    return lambda: attention_keys.launch_keys(tensors, buffer, sizes, HEADS["scale"], tile)


def build(candidate: tuple[str, Any]) -> str | None:
    """Compile in a process of its own; the code comes back through the cache on disk."""
    kernel, tile = candidate
    try:
        for shape in TUNED_SHAPES:
            launcher(kernel, tile, draw(BatchShape.parse(shape), WINDOW, 1))()
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  # too much shared memory, mostly: left out
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def tune(documents: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of every tile, best first, by shape, window and kernel."""
    found = list(candidates())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(12, mp_context=spawn) as pool:
        problems = list(pool.map(build, found))
    result: dict[str, Any] = {}
    for shape in TUNED_SHAPES:
        for window in (None, WINDOW):
            inputs = draw(BatchShape.parse(shape), window, documents)
            times: dict[str, list[tuple[float, str]]] = {"forward": [], "query": [], "key": []}
            for (kernel, tile), problem in zip(found, problems, strict=True):
                if problem is None:
                    run = launcher(kernel, tile, inputs)
                    ms = median_ms(
                        run, inputs.qkv.device, repeats=repeats, warm_up=2, hide_launch=True
                    )
                    times[kernel].append((ms, str(tile)))
            for kernel, all_times in times.items():
                name = f"{shape} window {window} {kernel}"
                result[name] = [f"{ms:.4f} {tile}" for ms, tile in sorted(all_times)[:8]]
                print(name, *result[name], sep="\n    ", flush=True)
    left_out = [f"{c[0]} {c[1]}: {p}" for c, p in zip(found, problems, strict=True) if p]
    print("left out:", *left_out, sep="\n    ", flush=True)
    return result | {"left_out": left_out}


def main() -> None:
    """Print a table, and with ``--json`` one object as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--tune", action="store_true", help="time tiles instead")
    parser.add_argument("--shape", type=BatchShape.parse, action="append")
    parser.add_argument("--documents", type=int, default=1, help="in a row, of random lengths")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "attention", "machine": print_machine()}
    if args.tune:
        result["tiles"] = tune(args.documents, min(args.repeats, 8))
    else:
        result["rows"] = []
        for shape in args.shape or map(BatchShape.parse, SHAPES):
            for window in (None, WINDOW):
                row = compare(shape, window, args.documents, args.repeats)
                result["rows"].append(row)
                report(row)
    if args.json:
        emit(result)


def report(row: dict[str, Any]) -> None:
    """A few lines for people."""
    print(f"{row['shape']} window {row['window']}, error {row['error']}")
    for name in WAYS:
        found = row.get(name)
        if found is None:
            continue
        if "error" in found:
            print(f"  {name:12} {found['error']}")
            continue
        print(
            f"  {name:12} forward {found['forward_ms']:7.3f} ms {found['forward_tflops']:4.0f} "
            f"TFLOP/s, with backward {found['both_ms']:7.3f} ms, "
            f"backward alone {found['backward_tflops']:4.0f} TFLOP/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
