"""The memory-bound kernels: microseconds, GB/s, and their share of what a copy reaches.

python benchmarks/gpu/pointwise.py [--tokens 16384 1024] [--experts 32] [--json]

Bytes are those that must move: every input read and every output written once. At few tokens
they may stay in the L2 cache, which is where a share above 100 % comes from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from machine import machine, print_machine
from roofline import measure_ceilings
from timing import emit, median_ms
from torch import Tensor

from nexus_cli.core.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from nexus_cli.core.kernels.rotary import rotate_
from nexus_cli.core.kernels.router import top_k_softmax, top_k_softmax_backward
from nexus_cli.core.kernels.routing import sort_by_expert
from nexus_cli.core.kernels.rows import combine_rows, spread_rows
from nexus_cli.core.kernels.swiglu import swiglu, swiglu_backward, swiglu_rows, swiglu_rows_backward

HIDDEN, TOP_K, HEADS, DIM, COLUMNS = 2880, 4, 72, 64, 5120
EPS, LIMIT = 1e-5, 7.0

# What to call, and the bytes that it must move.
Case = tuple[Callable[[], object], int]


def cases(tokens: int, experts: int) -> dict[str, Case]:
    """Every kernel at ``tokens`` tokens."""
    return {
        **dense_cases(tokens),
        **routed_cases(tokens, experts),
        **router_cases(tokens, experts),
    }


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random values on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=dtype)


def dense_cases(tokens: int) -> dict[str, Case]:
    """Norms, rotation, and the shared expert's activation."""
    x, y, up = (normal(tokens, HIDDEN) for _ in range(3))
    weight, gate_bias, up_bias = (normal(HIDDEN) for _ in range(3))
    scale = normal(1, dtype=torch.float32)
    row = x.nbytes
    _, rstd = rms_norm(x, weight, EPS)
    qkv = normal(tokens, COLUMNS)
    angles = normal(tokens, DIM // 2, dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()
    rotated = 2 * 2 * tokens * HEADS * DIM + cos.nbytes + sin.nbytes
    return {
        "rms_norm": (lambda: rms_norm(x, weight, EPS), 2 * row),
        "add_rms_norm": (lambda: add_rms_norm(x, y, weight, EPS), 4 * row),
        "rms_norm_backward": (lambda: rms_norm_backward(y, x, rstd, weight, up), 4 * row),
        "rotate": (lambda: rotate_(qkv, cos, sin, num_heads=HEADS, head_dim=DIM), rotated),
        "swiglu": (lambda: swiglu(x, up, gate_bias, up_bias, LIMIT), 3 * row),
        "swiglu_backward": (
            lambda: swiglu_backward(y, x, up, gate_bias, up_bias, scale, LIMIT),
            6 * row,
        ),
    }


def routed_cases(tokens: int, experts: int) -> dict[str, Case]:
    """What is done to routed rows. The biases are small, and left out of the bytes."""
    chosen = torch.rand(tokens, experts, device="cuda").topk(TOP_K).indices.int()
    routing = sort_by_expert(chosen, experts)
    count = tokens * TOP_K
    x, shared, residual = (normal(tokens, HIDDEN) for _ in range(3))
    rows, gate_up = normal(count, HIDDEN), normal(count, 2 * HIDDEN)
    gate_up_bias, down_bias = normal(experts, 2 * HIDDEN), normal(experts, HIDDEN)
    scores, score = normal(tokens, TOP_K), normal(count)
    scale, shared_bias = normal(1, dtype=torch.float32), normal(HIDDEN)
    expert = routing.expert_R
    token, row = x.nbytes, rows.nbytes
    return {
        "spread_rows": (lambda: spread_rows(x, routing), token + row),
        "swiglu_rows": (lambda: swiglu_rows(gate_up, gate_up_bias, expert, LIMIT), 3 * row),
        "swiglu_rows_backward": (
            lambda: swiglu_rows_backward(rows, gate_up, gate_up_bias, expert, score, LIMIT),
            5 * row,
        ),
        "combine_rows": (
            lambda: combine_rows(
                rows,
                routing,
                scores_TK=scores,
                experts_TK=chosen,
                bias_EH=down_bias,
                residual_TH=residual,
                shared_TH=shared,
                shared_bias_H=shared_bias,
                shared_scale=scale,
            ),
            row + 3 * token,
        ),
        "combine_rows, gradient": (
            lambda: combine_rows(rows, routing, residual_TH=residual),
            row + 2 * token,
        ),
    }


def router_cases(tokens: int, experts: int) -> dict[str, Case]:
    """The router's choice; bound by the launch, not by memory."""
    logits = normal(tokens, experts)
    scores, chosen = top_k_softmax(logits, TOP_K)
    grad = normal(tokens, TOP_K, dtype=torch.float32)
    few = scores.nbytes + chosen.nbytes
    return {
        "top_k_softmax": (lambda: top_k_softmax(logits, TOP_K), logits.nbytes + few),
        "top_k_softmax_backward": (
            lambda: top_k_softmax_backward(grad, scores, chosen, experts),
            logits.nbytes + few + grad.nbytes,
        ),
    }


def compile_all(experts: int) -> None:
    """Compile every kernel, several at a time: the compiler leaves Python's lock for long."""
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(call) for call, _ in cases(64, experts).values()]:
            done.result()


def measure(tokens: int, experts: int, copy_rate: float) -> dict[str, dict[str, float]]:
    """Figures of every kernel at ``tokens`` tokens."""
    device, found = torch.device("cuda"), {}
    for name, (call, moved) in cases(tokens, experts).items():
        ms = median_ms(call, device, repeats=20, hide_launch=True)
        rate = 1e3 * moved / ms
        found[name] = {"us": 1e3 * ms, "gb_s": rate / 1e9, "share": rate / copy_rate}
    return found


def main() -> int:
    """Measure, print a table, and at last one JSON object if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 1024])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("a CUDA device is needed", file=sys.stderr)
        return 2
    about = machine() if args.json else print_machine()
    ceilings = measure_ceilings(torch.device("cuda"))
    compile_all(args.experts)
    figures = {}
    print(f"a copy: {ceilings.bytes / 1e9:.0f} GB/s")
    for tokens in args.tokens:
        figures[str(tokens)] = measure(tokens, args.experts, ceilings.bytes)
        print(f"{tokens} tokens, {args.experts} experts")
        for name, row in figures[str(tokens)].items():
            line = f"{row['us']:9.1f} us {row['gb_s']:8.0f} GB/s {row['share']:7.0%}"
            print(f"  {name:24}{line}", flush=True)
    if args.json:
        emit({"machine": about, "copy_gb_s": ceilings.bytes / 1e9, "tokens": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
