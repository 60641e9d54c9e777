"""A forward pass of stock transformers without gradients, in this process alone.

python benchmarks/gpu/stock_forward.py [--shape 16x1024] [--layers 8] [--mode compiled]

Hidden states alone; then the head with top-32 and log-sum-exp over them in chunks of 2,048.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import time

import torch
from children import Result, child_parser, run_as_child
from models import compile_layers, random_ids, stock_model
from shapes import MODELS
from timing import finish, forget_peak, median_ms, peak_gib
from torch import Tensor

CHUNK, KEPT = 2048, 32


@torch.no_grad()
def measure(args: argparse.Namespace) -> Result:
    """Milliseconds of both parts, and tokens a second of the whole model's layers."""
    shape, device = MODELS[args.model], args.device
    model = stock_model(shape, args.layers, device, shared=False, skew=args.skew).eval()
    if args.mode == "compiled":
        compile_layers(model)
    ids = random_ids(args.shape, model.config.vocab_size, device)

    def hidden() -> Tensor:
        return model.model(input_ids=ids, use_cache=False).last_hidden_state

    def head(states: Tensor) -> None:
        for part in states.flatten(0, 1).split(CHUNK):
            logits = model.lm_head(part).float()
            torch.topk(logits, KEPT)
            torch.logsumexp(logits, -1)

    start = time.monotonic()
    states = hidden()
    finish(device)
    warm_up = time.monotonic() - start
    forget_peak(device)
    forward_ms = median_ms(hidden, device, repeats=args.repeats)
    head_ms = median_ms(lambda: head(states), device, repeats=args.repeats)
    whole_ms = forward_ms / args.layers * shape.layers
    return {
        "ms": forward_ms,
        "ms_a_layer": forward_ms / args.layers,
        "head_ms": head_ms,
        "tokens_a_second": 1e3 * args.shape.tokens / whole_ms,
        "tokens_a_second_with_head": 1e3 * args.shape.tokens / (whole_ms + head_ms),
        **peak_gib(device),
        "warm_up_s": warm_up,
    }


def main() -> None:
    """Measure one shape."""
    parser = child_parser(__doc__)
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    run_as_child(parser, measure)


if __name__ == "__main__":
    main()
