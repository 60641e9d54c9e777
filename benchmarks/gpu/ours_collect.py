"""What ``collect`` does on the device: a million tokens through the model, routers counted.

python benchmarks/gpu/ours_collect.py [--tokens 1000000] [--layers 24] [--batch-size 32]
    [--no-units]

Texts of random lengths, half of them cut at 512 tokens, in batches of like length. Prints one JSON
line: seconds of the forward passes (in them the sums over hidden units, unless ``--no-units``), of
the routers' accumulator, and of everything else (making batches, copying them, waiting for the
reservoir).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from children import Result, child_parser, run_as_child
from models import nexus_model
from numpy.typing import NDArray
from shapes import MODELS
from timing import Mark, elapsed_ms, finish, forget_peak, mark, peak_gib

from nexus_cli.core.model.gpt_oss.engine.attach import attach_engine
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.core.model.gpt_oss.observe import down_norms, observe_experts
from nexus_cli.core.router.accumulate import MomentAccumulator
from nexus_cli.core.router.batching import TokenBatch, make_batch, plan_batches
from nexus_cli.core.router.moments import RouterMoments
from nexus_cli.core.router.units import UnitAccumulator
from nexus_cli.pipeline.forward_memory import keep_decoded

LONGEST, SHORTEST, RESERVOIR = 512, 10, 50_000


@torch.inference_mode()
def measure(args: argparse.Namespace) -> Result:
    """Seconds, and tokens a second of all of them together."""
    device = args.device
    model = nexus_model(MODELS[args.model], args.layers, device, shared=False, skew=args.skew)
    attach_engine(model, experts_backend=args.experts_backend)
    units = observing(model) if args.units else None
    keep_decoded(model, args.batch_size * LONGEST, device)
    texts = random_texts(args.tokens, model.config.vocab_size)
    empty = RouterMoments.zeros(
        args.layers,
        model.config.num_local_experts,
        model.config.num_experts_per_tok,
        min(RESERVOIR, args.tokens // 10),
    )

    def run(batch: TokenBatch, accumulator: MomentAccumulator) -> list[Mark]:
        """Marks before the forward pass, after it, and after the accumulator."""
        marks = [mark(device)]
        if units is not None:
            units.count(batch.input_ids_BS.numel(), batch.body_N)
        out = model.model(
            input_ids=batch.input_ids_BS,
            position_ids=batch.position_ids_BS,
            use_cache=False,
            output_router_logits=True,
        )
        marks.append(mark(device))
        accumulator.add(out.router_logits, batch.body_N, batch.first_B, batch.keys_N)
        return [*marks, mark(device)]

    plan = plan_batches([len(text) for text in texts], args.batch_size)
    scratch = MomentAccumulator(empty, device)
    started = time.monotonic()
    for batch in batches(texts, plan[:: max(1, len(plan) // 4)], device):  # long and short ones
        run(batch, scratch)
    finish(device)
    warm_up = time.monotonic() - started
    forget_peak(device)
    accumulator = MomentAccumulator(empty, device)
    started, marks, padded = time.monotonic(), [], 0
    for batch in batches(texts, plan, device):
        marks.append(run(batch, accumulator))
        padded += batch.input_ids_BS.numel()
    counted = accumulator.moments()
    finish(device)
    wall = time.monotonic() - started
    forward = sum(elapsed_ms(a, b) for a, b, _ in marks) / 1e3
    counting = sum(elapsed_ms(b, c) for _, b, c in marks) / 1e3
    return {
        "units": args.units,
        "tokens": counted.body.tokens + counted.first.tokens,
        "padded_tokens": padded,
        "batches": len(plan),
        "seconds": wall,
        "forward_s": forward,
        "accumulator_s": counting,
        "rest_s": wall - forward - counting,
        "tokens_a_second": args.tokens / wall,
        "warm_up_s": warm_up,
        **peak_gib(device),
    }


def observing(model: NexusGptOssForCausalLM) -> UnitAccumulator:
    """What sums up the contributions of the model's hidden units."""
    norms = down_norms(model)
    units = UnitAccumulator(np.zeros(norms.shape), norms)
    observe_experts(model, [units.layer(index) for index in range(len(norms))])
    return units


def batches(
    texts: list[NDArray[np.int32]], plan: list[tuple[int, ...]], device: torch.device
) -> Iterator[TokenBatch]:
    """Made one by one, as the command does."""
    for indices in plan:
        chosen = [texts[index] for index in indices]
        yield make_batch(chosen, indices, pad_id=0, seed=0).to(device)


def random_texts(tokens: int, vocabulary: int) -> list[NDArray[np.int32]]:
    """Random token ids, ``tokens`` in all."""
    rng = np.random.default_rng(0)
    texts, left = [], tokens
    while left > 0:
        length = LONGEST if rng.random() < 0.5 else int(rng.integers(SHORTEST, LONGEST))
        length = min(length, left)
        texts.append(rng.integers(0, vocabulary, length, dtype=np.int32))
        left -= length
    return texts


def main() -> None:
    """Measure once."""
    parser = child_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--no-units", dest="units", action="store_false")
    parser.add_argument("--experts-backend", default="auto")
    run_as_child(parser, measure)


if __name__ == "__main__":
    main()
