"""One optimizer step: adamw-8bit beside PyTorch's fused fp32 AdamW, in the same run.

python benchmarks/gpu/optimizer.py [--layers 24] [--hidden 2880] [--repeats 10] [--json]

The trained tensors of the 20B shape: three square matrices, three biases and a gate a layer.
Bytes moved are those that must be: every tensor read and written once. ``clip`` is the norm of
all gradients and, for fp32 AdamW, scaling them; adamw-8bit scales in its step.
"""

from __future__ import annotations

import argparse
import sys

import torch
from machine import machine, print_machine
from timing import emit, forget_peak, median_ms, peak_gib

from nexus_cli.core.train.optim import (
    OptimizerKind,
    Rates,
    build_optimizer,
    clip_gradients,
    set_rates,
)

KINDS: tuple[OptimizerKind, ...] = ("adamw", "adamw-8bit")
RATES = Rates(shared=2e-4, gate=5e-3, router=0.0, router_bias=0.0)
# Read and written: fp32 gradient, weight, two moments; bf16 gradient and weight, remainder, codes.
MOVED = {"adamw": 4 + 3 * 8, "adamw-8bit": 2 + 2 * 4 + 2 * 2 + 16 / 256}


def tensors(layers: int, hidden: int, kind: OptimizerKind) -> dict[str, torch.nn.Parameter]:
    """Parameters with gradients, by their names in a checkpoint."""
    named = {}
    wide = torch.bfloat16 if kind == "adamw-8bit" else torch.float32
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.shared_expert."
        for part in ("gate_proj", "up_proj", "down_proj"):
            named[f"{prefix}{part}.weight"] = torch.randn(hidden, hidden, device="cuda").to(wide)
            named[f"{prefix}{part}.bias"] = torch.randn(hidden, device="cuda")
        named[f"{prefix}output_gate"] = torch.ones(1, device="cuda")
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in named.items()}
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return parameters


def measure(kind: OptimizerKind, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds, GB/s and memory of one kind."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    forget_peak(device)
    named = tensors(args.layers, args.hidden, kind)
    optimizer = build_optimizer(named, weight_decay=0.01, optimizer=kind)
    set_rates(optimizer, RATES)
    count = sum(parameter.numel() for parameter in named.values())
    clip_ms = median_ms(lambda: clip_gradients(optimizer, 1.0), device, repeats=args.repeats)
    step_ms = median_ms(optimizer.step, device, repeats=args.repeats)
    # Without launches: what the device alone takes.
    device_ms = median_ms(optimizer.step, device, repeats=3, hide_launch=True)
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    held += sum(parameter.nbytes for parameter in named.values())
    gradients = sum(p.grad.nbytes for p in named.values() if p.grad is not None)
    return {
        "parameters": count,
        "step_ms": step_ms,
        "step_device_ms": device_ms,
        "clip_ms": clip_ms,
        "moved_gb_s": MOVED[kind] * count / device_ms / 1e6,
        "bytes_a_parameter": held / count,
        "gradient_bytes_a_parameter": gradients / count,
        **peak_gib(device),
    }


def main() -> None:
    """Measure both kinds one after the other, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2880)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    print_machine()
    results = {kind: measure(kind, args) for kind in KINDS}
    for name in results["adamw"]:
        row = "  ".join(f"{kind} {results[kind][name]:12.4g}" for kind in KINDS)
        print(f"{name:28} {row}")
    ratio = results["adamw"]["step_ms"] / results["adamw-8bit"]["step_ms"]
    print(f"adamw-8bit takes 1/{ratio:.2f} of the time of fused fp32 AdamW")
    if args.json:
        emit({"machine": machine(), "speedup": ratio, **results})


if __name__ == "__main__":
    main()
