"""The shared expert, forward and backward: the one place where weights have gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nexus_cli.core.kernels.swiglu import swiglu, swiglu_backward

# Shape letters in this file: T tokens, H hidden, I width of the shared expert.


class SharedExpert(NamedTuple):
    """Its tensors, in the order in which autograd sees them.

    Matrices may be fp32 masters under a bf16 model: they are cast on use.
    """

    gate_weight: Tensor
    gate_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    output_gate: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All seven."""
        return tuple(self)


def shared_pre_activations(expert: SharedExpert, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """``x W_gate^T`` and ``x W_up^T``, each ``[T, I]``, without their biases."""
    dtype = x_TH.dtype
    return x_TH @ expert.gate_weight.to(dtype).T, x_TH @ expert.up_weight.to(dtype).T


def shared_forward(
    expert: SharedExpert, x_TH: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``act W_down^T`` ``[T, H]`` without bias and gate, and the two pre-activations."""
    gate_TI, up_TI = shared_pre_activations(expert, x_TH)
    hidden_TI = swiglu(gate_TI, up_TI, expert.gate_bias, expert.up_bias, limit)
    return hidden_TI @ expert.down_weight.to(x_TH.dtype).T, gate_TI, up_TI


def shared_backward(
    expert: SharedExpert,
    grad_TH: Tensor,
    x_TH: Tensor,
    pre_activations: tuple[Tensor, Tensor],
    limit: float,
    *,
    needs_input: bool = True,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Gradients of the seven tensors, and of the input ``[T, H]`` if that is needed.

    The expert's own output was not kept: with ``d_act = grad W_down``,
    ``d g = <act, d_act> + <grad, b_down>``.
    """
    gate_TI, up_TI = pre_activations
    dtype = x_TH.dtype
    wide = torch.promote_types(dtype, torch.float32)
    grad_hidden_TI = grad_TH @ expert.down_weight.to(dtype)
    grad_gate_TI, grad_up_TI, hidden_TI, dot_T = swiglu_backward(
        grad_hidden_TI,
        gate_TI,
        up_TI,
        expert.gate_bias,
        expert.up_bias,
        expert.output_gate,
        limit,
    )
    grad_sum_H = grad_TH.sum(0, dtype=wide)
    gate = expert.output_gate.to(wide)
    grads = SharedExpert(
        gate_weight=weight_gradient(grad_gate_TI, x_TH, expert.gate_weight.dtype),
        gate_bias=grad_gate_TI.sum(0, dtype=wide).to(expert.gate_bias.dtype),
        up_weight=weight_gradient(grad_up_TI, x_TH, expert.up_weight.dtype),
        up_bias=grad_up_TI.sum(0, dtype=wide).to(expert.up_bias.dtype),
        down_weight=weight_gradient(grad_TH, hidden_TI, expert.down_weight.dtype),
        down_bias=(gate * grad_sum_H).to(expert.down_bias.dtype),
        output_gate=(dot_T.sum() + (grad_sum_H * expert.down_bias.to(wide)).sum())
        .to(expert.output_gate.dtype)
        .view_as(expert.output_gate),
    )
    if not needs_input:
        return grads.tensors, None
    grad_x_TH = grad_gate_TI @ expert.gate_weight.to(dtype)
    return grads.tensors, grad_x_TH.addmm_(grad_up_TI, expert.up_weight.to(dtype))


def weight_gradient(grad_TM: Tensor, x_TN: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad^T x`` ``[M, N]`` in the weight's own dtype: fp32 for a master, without rounding."""
    if grad_TM.is_cuda and dtype == torch.float32 and grad_TM.dtype != dtype:
        return torch.mm(grad_TM.T, x_TN, out_dtype=torch.float32)
    return (grad_TM.T @ x_TN).to(dtype)
