"""A student step of stock transformers, forward and backward, in this process alone.

python benchmarks/gpu/stock_step.py [--shape 16x1024] [--layers 8] [--mode compiled]
    [--recompute none|all|N]

Frozen bf16 experts by ``grouped_mm``, flex attention, a trainable bf16 expert beside them; the
loss is the mean square of the hidden states. ``--recompute N`` lets the first N layers run again.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import time

from children import Result, child_parser, run_as_child
from models import compile_layers, random_ids, recompute_first, stock_model
from shapes import MODELS
from timing import allocated_gib, finish, forget_peak, median_ms, peak_gib

WARM_UP = 3


def measure(args: argparse.Namespace) -> Result:
    """Milliseconds a layer, tokens a second of the whole model's layers, and peak memory."""
    shape, device = MODELS[args.model], args.device
    model = stock_model(shape, args.layers, device, shared=True, skew=args.skew)
    recompute_first(model, recomputed(args.recompute, args.layers))
    if args.mode == "compiled":
        compile_layers(model)
    ids = random_ids(args.shape, model.config.vocab_size, device)
    weights = allocated_gib(device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.float().pow(2).mean().backward()

    start = time.monotonic()
    for _ in range(WARM_UP):
        step()
    finish(device)
    warm_up = time.monotonic() - start
    forget_peak(device)
    ms = median_ms(step, device, repeats=args.repeats, warm_up=1)
    layer = ms / args.layers
    return {
        "ms": ms,
        "ms_a_layer": layer,
        "tokens_a_second": 1e3 * args.shape.tokens / (layer * shape.layers),
        "weights_gib": weights,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **peak_gib(device),
        "warm_up_s": warm_up,
    }


def recomputed(text: str, layers: int) -> int:
    """How many layers run again."""
    return {"none": 0, "all": layers}[text] if text in ("none", "all") else int(text)


def main() -> None:
    """Measure one shape."""
    parser = child_parser(__doc__)
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--recompute", default="none", help="none, all, or how many layers")
    run_as_child(parser, measure)


if __name__ == "__main__":
    main()
