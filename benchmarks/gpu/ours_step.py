"""Our student step, in this process alone.

python benchmarks/gpu/ours_step.py [--shape 16x1024] [--layers 24] [--work whole]
    [--optimizer adamw-8bit] [--memory-gib 76] [--experts-backend auto]

``--work layers``: forward and backward of the mean square of the hidden states, which is what
``stock_step.py`` times. Each layer keeps what it would keep in the whole model on the whole card.
``--work whole``: self teacher, student, cross entropy and KL, backward, clipping, optimizer.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from children import Result, child_parser, run_as_child
from models import nexus_model, random_ids
from shapes import MODELS, BatchShape
from timing import (
    GIB,
    Mark,
    allocated_gib,
    elapsed_ms,
    finish,
    forget_peak,
    intervals_ms,
    mark,
    median_ms,
    peak_gib,
)
from torch import Tensor, nn

from nexus_cli.config.train import TrainRuntime
from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.self_teacher import SelfTeacher
from nexus_cli.core.model.gpt_oss.engine.attach import Engine, attach_engine
from nexus_cli.core.model.gpt_oss.engine.graphs import MAX_TOKENS
from nexus_cli.core.model.gpt_oss.engine.memory import LEVELS
from nexus_cli.core.model.gpt_oss.surgery import trainable_names
from nexus_cli.core.train.optim import Rates, build_optimizer, clip_gradients, set_rates
from nexus_cli.core.train.precision import promote
from nexus_cli.core.train.step import DistillationStep, Objective, SourceWeights, StepScale

WARM_UP = 3
SPARE = 2**30
LOGIT_BUFFERS, HIDDEN_BUFFERS = 3, 4
# Of a trained number beside its master: gradient and two moments; in 8 bits a bf16 gradient, the
# remainder, two codes, and two scales for 256.
STATE_BYTES = {"adamw": 4 + 8, "adamw-8bit": 2 + 2 + 2 + 8 / 256}
PHASES = ("teacher", "forward", "head", "backward", "optimizer")


def measure(args: argparse.Namespace) -> Result:
    """What was asked for, with the plan and the memory that it took."""
    shape, device = MODELS[args.model], args.device
    model = nexus_model(shape, args.layers, device, shared=True, skew=args.skew)
    frozen = allocated_gib(device)
    masters = promote(model, trainable_names(model), split=args.optimizer == "adamw-8bit")
    engine = attach_engine(model, experts_backend=args.experts_backend)
    plan = make_plan(args, model, engine, masters) if device.type == "cuda" else []
    if device.type == "cuda" and not args.no_graph and args.shape.tokens <= MAX_TOKENS:
        engine.capture(args.shape.batch, args.shape.length, accumulates=False)
        plan.append("layers run as CUDA graphs")
    work = layers_alone if args.work == "layers" else whole_step
    return {
        **work(args, model, masters),
        **peak_gib(device),
        "model_gib": frozen,
        "trained": sum(master.numel() for master in masters.values()),
        "plan": plan,
        "kept_layers": {level: sum(getattr(k, level) for k in engine.kept) for level in LEVELS},
    }


def make_plan(
    args: argparse.Namespace, model: Any, engine: Engine, masters: Mapping[str, nn.Parameter]
) -> list[str]:
    """Give the engine what the card has left for activations; its plan in words.

    Set aside are the gradients and what the optimizer adds, logits, final hidden states, one
    layer's peak, and a GiB. A model of fewer layers gets as much for each as in the whole model::

        budget = (memory - ends - fixed) * layers / all layers - layers' weights and state
    """
    config, tokens = model.config, args.shape.tokens
    ends = sum(p.nbytes for name, p in model.named_parameters() if ".layers." not in name)
    fixed = LOGIT_BUFFERS * 4 * min(args.head_chunk, tokens) * config.vocab_size
    fixed += HIDDEN_BUFFERS * 2 * tokens * config.hidden_size
    fixed += engine.transient_bytes(tokens) + SPARE
    state = sum(master.numel() for master in masters.values()) * STATE_BYTES[args.optimizer]
    layers = torch.cuda.memory_allocated(args.device) - ends + state
    share = args.layers / MODELS[args.model].layers
    budget = (args.memory_gib * GIB - ends - fixed) * share - layers
    return engine.plan_training(tokens=tokens, budget_bytes=int(budget)).describe()


def layers_alone(
    args: argparse.Namespace, model: Any, masters: Mapping[str, nn.Parameter]
) -> Result:
    """Forward and backward of the layers; gradients are dropped before every step."""
    device = args.device
    ids = random_ids(args.shape, model.config.vocab_size, device)
    positions = torch.arange(args.shape.length, device=device).expand_as(ids)

    def step() -> None:
        for master in masters.values():
            master.grad = None
        out = model.model(input_ids=ids, position_ids=positions, use_cache=False)
        out.last_hidden_state.float().pow(2).mean().backward()

    warm_up = warmed(step, device)
    ms = median_ms(step, device, repeats=args.repeats, warm_up=1)
    layer = ms / args.layers
    whole = layer * MODELS[args.model].layers
    return {
        "ms": ms,
        "ms_a_layer": layer,
        "tokens_a_second": 1e3 * args.shape.tokens / whole,
        "warm_up_s": warm_up,
    }


def whole_step(args: argparse.Namespace, model: Any, masters: Mapping[str, nn.Parameter]) -> Result:
    """One optimizer step of one micro-batch, phase by phase."""
    device = args.device
    step = WholeStep(args, model, masters)
    warm_up = warmed(step.run, device)
    step.marks.clear()
    for _ in range(args.repeats):
        step.run()
    finish(device)
    spans = [intervals_ms(marks) for marks in step.marks]
    phases = {name: statistics.median(s[i] for s in spans) for i, name in enumerate(PHASES)}
    whole = [elapsed_ms(marks[0], marks[-1]) for marks in step.marks]
    ms = statistics.median(whole)
    return {
        "ms": ms,
        "tokens_a_second": 1e3 * args.shape.tokens / ms,
        "ms_a_layer": (phases["forward"] + phases["backward"]) / args.layers,
        "phases_ms": phases,
        "optimizer": args.optimizer,
        "loss": float(step.loss),
        "warm_up_s": warm_up,
    }


class WholeStep:
    """What the training loop does for one step of one micro-batch, with marks between."""

    def __init__(
        self, args: argparse.Namespace, model: Any, masters: Mapping[str, nn.Parameter]
    ) -> None:
        self._device = args.device
        self._batch = random_batch(args.shape, model.config.vocab_size, args.device)
        self._scale = StepScale(tokens=self._batch.num_targets, sequences=args.shape.batch)
        self._teacher = SelfTeacher(model)
        objective = Objective(
            sources=[SourceWeights(ce=1.0, kd=0.1, router=0.0)], chunk_size=args.head_chunk
        )
        self._step = DistillationStep(model, objective).to(args.device)
        self._optimizer = build_optimizer(masters, weight_decay=0.01, optimizer=args.optimizer)
        set_rates(self._optimizer, Rates(shared=1e-5, gate=1e-5, router=0.0, router_bias=0.0))
        self.marks: list[list[Mark]] = []
        self.loss = torch.zeros(())
        model.model.register_forward_hook(lambda *_: self._hidden_is_done())

    def run(self) -> None:
        """One step."""
        self.marks.append([])
        self._mark()
        self._optimizer.zero_grad(set_to_none=True)
        signal = self._teacher.signal(self._batch)  # its forward leaves the second mark
        output = self._step(self._batch, signal, self._scale)  # and the student's the third
        self._mark()
        output.loss.backward()
        self._mark()
        clip_gradients(self._optimizer, 1.0)
        self._optimizer.step()
        self._mark()
        self.loss = output.loss.detach()

    def _hidden_is_done(self) -> None:
        self._mark()

    def _mark(self) -> None:
        self.marks[-1].append(mark(self._device))


def random_batch(shape: BatchShape, vocabulary: int, device: torch.device) -> Batch:
    """One document a sequence, every token of it counted."""
    ids = random_ids(shape, vocabulary, device)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False
    rows: Tensor = torch.arange(shape.batch, device=device)
    positions = torch.arange(shape.length, device=device).expand_as(ids).contiguous()
    return Batch(ids, positions, counted, torch.zeros_like(rows), rows)


def warmed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of the first steps; peak memory is forgotten after them."""
    start = time.monotonic()
    for _ in range(WARM_UP):
        step()
    finish(device)
    seconds = time.monotonic() - start
    forget_peak(device)
    return seconds


def main() -> None:
    """Measure one shape."""
    parser = child_parser(__doc__)
    parser.add_argument("--work", choices=("layers", "whole"), default="whole")
    parser.add_argument("--optimizer", choices=("adamw", "adamw-8bit"), default="adamw")
    parser.add_argument("--memory-gib", type=float, default=76.0, help="that the run may take")
    parser.add_argument("--experts-backend", default="auto")
    parser.add_argument("--no-graph", action="store_true", help="launch small batches one by one")
    parser.add_argument("--head-chunk", type=int, default=TrainRuntime().head_chunk)
    run_as_child(parser, measure)


if __name__ == "__main__":
    main()
