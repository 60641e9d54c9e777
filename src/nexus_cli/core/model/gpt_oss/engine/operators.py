"""The routed block as operators of torch, so that ``torch.compile`` works around them.

A compiled decoder layer sees two opaque calls with known shapes and fuses the rest. The modelling
file uses these wherever Nexus is importable and the model is in bf16 on a CUDA device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus_cli.core.kernels.routing import Routing, sort_by_expert
from nexus_cli.core.kernels.rows import combine_rows
from nexus_cli.core.model.gpt_oss.engine.device import on_device_of
from nexus_cli.core.model.gpt_oss.engine.experts import (
    RoutedBlock,
    experts_backward,
    experts_forward,
)
from nexus_cli.core.model.gpt_oss.engine.policy import make_products
from nexus_cli.core.model.gpt_oss.engine.products import PackedWeights, Workspace

# Shape letters in this file: T tokens, K experts a token, R = T * K rows, H hidden, I expert
# width, E experts.

_workspaces: dict[torch.device, Workspace] = {}


def _block(packed: PackedWeights, backend: str) -> RoutedBlock:
    device = packed.gate_up_blocks.device
    workspace = _workspaces.setdefault(device, Workspace())
    return RoutedBlock.of(packed, make_products(backend, packed, workspace))  # type: ignore[arg-type]


@torch.library.custom_op("nexus::routed_experts", mutates_args=())
def routed_experts_parts(
    x_TH: Tensor,
    scores_TK: Tensor,
    experts_TK: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    limit: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The routed sum ``[T, H]``, the pre-activations ``[R, 2I]``, and the routing's vectors."""
    packed = PackedWeights(
        gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias, limit
    )
    with on_device_of(x_TH):
        routing = sort_by_expert(experts_TK, len(gate_up_blocks))
        rows_RH, gate_up_RI = experts_forward(_block(packed, backend), x_TH, routing)
        out_TH = combine_rows(
            rows_RH, routing, scores_TK=scores_TK, experts_TK=experts_TK.int(), bias_EH=down_bias
        )
    return out_TH, gate_up_RI, *routing.vectors


@routed_experts_parts.register_fake
def _(
    x_TH: Tensor,
    scores_TK: Tensor,  # noqa: ARG001
    experts_TK: Tensor,
    gate_up_blocks: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    rows = experts_TK.shape[0] * experts_TK.shape[1]
    vector = experts_TK.new_empty(rows, dtype=torch.int32)
    return (
        torch.empty_like(x_TH),
        x_TH.new_empty(rows, gate_up_blocks.shape[1]),
        vector,
        experts_TK.new_empty(experts_TK.shape, dtype=torch.int32),
        torch.empty_like(vector),
        experts_TK.new_empty(gate_up_blocks.shape[0], dtype=torch.int32),
        torch.empty_like(vector),
    )


@torch.library.custom_op("nexus::routed_experts_backward", mutates_args=())
def routed_experts_backward(
    grad_TH: Tensor,
    gate_up_RI: Tensor,
    scores_TK: Tensor,
    experts_TK: Tensor,
    routing: list[Tensor],
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    limit: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input ``[T, H]`` and of the scores ``[T, K]``."""
    packed = PackedWeights(
        gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias, limit
    )
    sorted_rows = Routing.of(routing, experts_TK.shape[1])
    with on_device_of(grad_TH):
        grads = experts_backward(
            _block(packed, backend),
            grad_TH.contiguous(),
            gate_up_RI,
            scores_TK,
            experts_TK,
            sorted_rows,
        )
        assert grads.rows_RH is not None
        return combine_rows(grads.rows_RH, sorted_rows), grads.scores_TK.to(scores_TK.dtype)


@routed_experts_backward.register_fake
def _(grad_TH: Tensor, gate_up_RI: Tensor, scores_TK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(grad_TH), torch.empty_like(scores_TK)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, scores_TK, experts_TK, *packed, limit, backend = inputs
    ctx.save_for_backward(scores_TK, experts_TK, *output[1:], *packed)
    ctx.limit, ctx.backend = limit, backend


def _backward(ctx: Any, grad_TH: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    scores_TK, experts_TK, gate_up_RI, *rest = ctx.saved_tensors
    grad_x_TH, grad_scores_TK = routed_experts_backward(
        grad_TH,
        gate_up_RI,
        scores_TK,
        experts_TK,
        list(rest[:5]),
        *rest[5:],
        ctx.limit,
        ctx.backend,
    )
    return grad_x_TH, grad_scores_TK, *(None,) * 9


routed_experts_parts.register_autograd(_backward, setup_context=_setup_context)


def routed_experts(
    x_TH: Tensor,
    scores_TK: Tensor,
    experts_TK: Tensor,
    gate_up: tuple[Tensor, Tensor],
    gate_up_bias: Tensor,
    down: tuple[Tensor, Tensor],
    down_bias: Tensor,
    limit: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """The routed sum ``[T, H]`` over packed weights, with gradients to input and scores.

    Args:
        x_TH: input.
        scores_TK: weight of each of a token's experts.
        experts_TK: their indices.
        gate_up: blocks ``[E, 2I, H/32, 16]`` and scales ``[E, 2I, H/32]``.
        gate_up_bias: ``[E, 2I]``.
        down: blocks ``[E, H, I/32, 16]`` and scales ``[E, H, I/32]``.
        down_bias: ``[E, H]``.
        limit: of the clamped SwiGLU.
        backend: see ``policy.py``.
    """
    out: Tensor = routed_experts_parts(
        x_TH,
        scores_TK,
        experts_TK,
        *gate_up,
        gate_up_bias,
        *down,
        down_bias,
        limit,
        backend,
    )[0]
    return out


def routed_sum(block: RoutedBlock, x_TH: Tensor, scores_TK: Tensor, experts_TK: Tensor) -> Tensor:
    """The routed sum ``[T, H]`` by a block that is there already, without gradients.

    Raises:
        ValueError: a gradient is wanted.
    """
    if torch.is_grad_enabled() and (x_TH.requires_grad or scores_TK.requires_grad):
        raise ValueError("experts kept decoded have a gradient in the engine's own layers only")
    with on_device_of(x_TH):
        routing = sort_by_expert(experts_TK, len(block.down_bias))
        rows_RH, _ = experts_forward(block, x_TH, routing)
        return combine_rows(
            rows_RH,
            routing,
            scores_TK=scores_TK,
            experts_TK=experts_TK.int(),
            bias_EH=block.down_bias,
        )
