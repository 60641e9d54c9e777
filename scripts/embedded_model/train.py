"""The training loop: packed epochs, one learning-rate curve, a last phase rounded to MXFP4."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from encode import Documents
from masters import MasterWeights
from packing import IGNORED, Batch, attention_masks, packed_epoch
from routing import RouterTap, balance_loss
from torch import Tensor, nn
from torch.nn import functional
from transformers import GptOssForCausalLM


@dataclass(frozen=True)
class Recipe:
    """How the embedded model is trained."""

    num_steps: int
    rows_a_step: int = 32
    length: int = 1024
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    decay_share: float = 0.6
    rounded_share: float = 0.25
    weight_decay: float = 1.0
    dropout: float = 0.25
    balance_weight: float = 0.02
    max_norm: float = 1.0
    seed: int = 0
    compiles: bool = False

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, a plateau, and a linear way down to zero."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = (self.num_steps - step) / max(1.0, self.decay_share * self.num_steps)
        return self.learning_rate * min(warm, left, 1.0)

    def rounds_at(self, step: int) -> bool:
        """Whether the experts are rounded to MXFP4 in this step's forward."""
        return step >= (1 - self.rounded_share) * self.num_steps


def train(
    model: GptOssForCausalLM,
    documents: Documents,
    recipe: Recipe,
    report: Callable[[int, str], None],
) -> None:
    """Train a model in place; it ends with its experts on the MXFP4 grid.

    Args:
        model: bf16, on its device.
        documents: what to learn.
        recipe: the numbers.
        report: called every 100 steps with the step and a line of figures.
    """
    _add_dropout(model, recipe.dropout)
    tap = RouterTap(model)
    masters = MasterWeights(model, recipe.weight_decay)
    if recipe.compiles:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    head_loss = torch.compile(_head_loss, dynamic=False) if recipe.compiles else _head_loss
    device = model.lm_head.weight.device
    model.train()
    began = window_began = time.monotonic()
    batches = itertools.islice(_batches(documents, recipe), recipe.num_steps)
    for step, batch in enumerate(batches):
        masters.rounds_experts = recipe.rounds_at(step)
        inputs, labels = batch.inputs.to(device), batch.labels.to(device)
        positions = batch.positions.to(device)
        masks = attention_masks(positions, model.config.sliding_window)
        hidden = model.model(inputs, attention_mask=masks, position_ids=positions)[0]
        loss = head_loss(hidden, model.lm_head.weight, labels)
        balance = balance_loss(tap.take(), model.config.num_experts_per_tok)
        (loss + recipe.balance_weight * balance).backward()
        norm = masters.step(recipe.learning_rate_at(step), recipe.max_norm)
        if (step + 1) % 100 == 0 or step < 3:
            steps = 100 if step >= 100 else 1
            speed = steps * inputs.numel() / (time.monotonic() - window_began)
            report(
                step + 1,
                f"loss {loss.item():.4f} balance {balance.item():.3f} norm {norm.item():.2f} "
                f"tokens/s {speed:,.0f} seconds {time.monotonic() - began:.0f}",
            )
            window_began = time.monotonic()
    masters.rounds_experts = True
    masters.write_back()
    tap.take()


def _batches(documents: Documents, recipe: Recipe) -> Iterator[Batch]:
    rng = np.random.default_rng(recipe.seed)
    while True:
        yield from packed_epoch(documents, recipe.length, recipe.rows_a_step, rng)


def _head_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, head).float().flatten(0, 1)
    return functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)


def _add_dropout(model: GptOssForCausalLM, rate: float) -> None:
    """Drop out what attention and experts add to the residual stream."""

    def drop(module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, *others = output
        return (functional.dropout(first, rate, module.training), *others)

    if rate > 0:
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(drop)
            layer.mlp.register_forward_hook(drop)
