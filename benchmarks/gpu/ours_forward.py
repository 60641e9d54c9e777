"""Our forward pass without gradients, in this process alone.

python benchmarks/gpu/ours_forward.py [--shape 16x1024] [--layers 8] [--experts-backend auto]

Hidden states alone; the head with top-32, exact tail and label over them; both together. Prints
one JSON line.
"""

from __future__ import annotations

import argparse
import time

import torch
from children import Result, child_parser, run_as_child
from models import nexus_model, random_ids
from shapes import MODELS
from stock_forward import CHUNK, KEPT
from timing import allocated_gib, finish, forget_peak, median_ms, peak_gib
from torch import Tensor

from nexus_cli.core.distill.topk import top_k
from nexus_cli.core.model.gpt_oss.engine.attach import attach_engine
from nexus_cli.pipeline.forward_memory import keep_decoded


@torch.inference_mode()
def measure(args: argparse.Namespace) -> Result:
    """Milliseconds of both parts, and tokens a second of the whole model's layers."""
    shape, device = MODELS[args.model], args.device
    model = nexus_model(shape, args.layers, device, shared=False, skew=args.skew)
    attach_engine(model, experts_backend=args.experts_backend)
    keep_decoded(model, args.shape.tokens, device)
    ids = random_ids(args.shape, model.config.vocab_size, device)
    positions = torch.arange(args.shape.length, device=device).expand_as(ids)
    labels = ids.roll(-1, dims=1).flatten()
    weights = allocated_gib(device)

    def hidden() -> Tensor:
        out = model.model(input_ids=ids, position_ids=positions, use_cache=False)
        return out.last_hidden_state

    def head(states: Tensor) -> None:
        top_k(states.flatten(0, 1), model.lm_head.weight, labels, KEPT, chunk_size=CHUNK)

    start = time.monotonic()
    states = hidden()
    finish(device)
    warm_up = time.monotonic() - start
    forget_peak(device)
    forward_ms = median_ms(hidden, device, repeats=args.repeats)
    head_ms = median_ms(lambda: head(states), device, repeats=args.repeats)
    both_ms = median_ms(lambda: head(hidden()), device, repeats=args.repeats, warm_up=1)
    layer_ms = forward_ms / args.layers
    whole_ms = layer_ms * shape.layers
    return {
        "ms": forward_ms,
        "ms_a_layer": layer_ms,
        "head_ms": head_ms,
        "ms_with_head": both_ms,
        "tokens_a_second": 1e3 * args.shape.tokens / whole_ms,
        "tokens_a_second_with_head": 1e3 * args.shape.tokens / (whole_ms + head_ms),
        "weights_gib": weights,
        **peak_gib(device),
        "warm_up_s": warm_up,
    }


def main() -> None:
    """Measure one shape."""
    parser = child_parser(__doc__)
    parser.add_argument("--experts-backend", default="auto")
    run_as_child(parser, measure)


if __name__ == "__main__":
    main()
