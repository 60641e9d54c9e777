"""Random packed experts of one layer, and rows that are routed to them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nexus_cli.core.kernels.mxfp4_decode import order_scales
from nexus_cli.core.kernels.routing import Routing, sort_by_expert
from nexus_cli.core.model.gpt_oss.engine.products import PackedWeights

TOP_K, LIMIT = 4, 7.0


@dataclass(frozen=True)
class Case:
    """Rows of one measurement.

    Attributes:
        x: ``[T, H]`` bf16.
        grad: of the block's output, likewise.
        scores: bf16 ``[T, K]``.
        experts: int32 ``[T, K]``.
        routing: the same, sorted.
    """

    x: Tensor
    grad: Tensor
    scores: Tensor
    experts: Tensor
    routing: Routing

    @property
    def counts(self) -> list[int]:
        """Rows of each expert."""
        ends = [0, *self.routing.offsets_E.tolist()]
        return [b - a for a, b in pairwise(ends)]


def make_weights(experts: int, hidden: int, device: torch.device) -> PackedWeights:
    """Random bytes; scales as small as a checkpoint's, in the kernels' order as after loading."""
    torch.manual_seed(0)

    def packed(rows: int) -> tuple[Tensor, Tensor]:
        size = (experts, rows, hidden // 32)
        blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, device=device)
        scales = torch.randint(119, 123, size, dtype=torch.uint8, device=device)
        return blocks, order_scales(scales)

    def bias(rows: int) -> Tensor:
        return torch.randn(experts, rows, device=device).mul_(0.1).bfloat16()

    gate_up, down = packed(2 * hidden), packed(hidden)
    return PackedWeights(*gate_up, bias(2 * hidden), *down, bias(hidden), LIMIT, small_scales=True)


def make_case(tokens: int, experts: int, hidden: int, skew: float, device: torch.device) -> Case:
    """Random rows; each token goes to the best of random logits, some experts being favoured."""
    torch.manual_seed(1)
    logits = torch.randn(tokens, experts, device=device)
    logits += skew * torch.randn(experts, device=device)
    best, chosen = logits.topk(TOP_K, dim=-1)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    grad = torch.randn(tokens, hidden, device=device).bfloat16()
    return Case(x, grad, best.softmax(-1).bfloat16(), chosen.int(), sort_by_expert(chosen, experts))
