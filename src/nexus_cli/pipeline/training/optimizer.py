"""``optimizer.kind``: the optimizer of a run, and the bytes that it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from nexus_cli.config.train import OptimizerConfig
from nexus_cli.core.kernels.adamw_8bit import BLOCK
from nexus_cli.core.train.optim import Rates, build_optimizer
from nexus_cli.core.train.precision import SPLIT_FROM
from nexus_cli.errors import ConfigError
from nexus_cli.pipeline.training.request import Request

MASTER = 4  # bytes of an fp32 number
MOMENTS = 8


def splits(request: Request) -> bool:
    """Whether large masters are kept as bf16 weights and remainders."""
    return request.config.optimizer.kind == "adamw-8bit"


def require_exact_sums(request: Request) -> None:
    """Refuse a step whose gradients would be summed in bf16 over and over.

    The gradients of bf16 weights are bf16. One forward pass a step needs no sum; several are
    summed in fp32 on one rank, and over ranks there is one sum. Both together are refused, as
    DDP's buckets are bf16 then.

    Raises:
        ConfigError: the run accumulates on several ranks.
    """
    accumulation = request.config.gradient_accumulation_steps
    if splits(request) and request.world_size > 1 and accumulation > 1:
        raise ConfigError(
            f"adamw-8bit cannot sum {accumulation} forward passes on each of "
            f"{request.world_size} ranks: their gradients would be added in bf16",
            hint="use --gradient-accumulation-steps 1 with a larger --batch-size, one rank, or "
            "--optimizer adamw",
        )


def make_optimizer(request: Request, masters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the config names, over the masters."""
    config = request.config.optimizer
    if splits(request) and request.config.gradient_accumulation_steps > 1:
        for master in masters.values():
            master.grad_dtype = torch.float32
    return build_optimizer(
        masters,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        epsilon=config.epsilon,
        optimizer=config.kind,
    )


def peak_rates(config: OptimizerConfig) -> Rates:
    """The largest learning rate of each group; the schedule scales it step by step."""
    return Rates(
        shared=config.learning_rate,
        gate=config.gate_learning_rate,
        router=config.router_learning_rate,
        router_bias=config.router_learning_rate,
    )


def training_bytes(request: Request, sizes: Iterable[int]) -> int:
    """Masters, gradients, moments and anchor of trained tensors of these sizes, in memory."""
    anchor = MASTER if request.config.averaging.every else 0
    accumulates = request.config.gradient_accumulation_steps > 1
    total = 0
    for size in sizes:
        if _is_split(request, size):
            grad = MASTER if accumulates else 2
            total += size * (MASTER + grad + anchor) + _codes(size)
        else:
            total += size * (MASTER + MASTER + MOMENTS + anchor)
    return total


def cast_numbers(request: Request, sizes: Iterable[int], wide: int) -> int:
    """Trained numbers that the model casts where it uses them, and so holds once more.

    Args:
        request: of the run.
        sizes: of the trained tensors.
        wide: bytes of a number in the model's own format.
    """
    return sum(size for size in sizes if not (wide == 2 and _is_split(request, size)))


def state_bytes(request: Request, sizes: Iterable[int]) -> int:
    """Masters and moments in a checkpoint."""
    return sum(
        size * MASTER + (_codes(size) if _is_split(request, size) else size * MOMENTS)
        for size in sizes
    )


def _is_split(request: Request, size: int) -> bool:
    return splits(request) and size >= SPLIT_FROM


def _codes(size: int) -> int:
    """Two codes a number, and two scales a block."""
    return 2 * size + 2 * MASTER * -(-size // BLOCK)
