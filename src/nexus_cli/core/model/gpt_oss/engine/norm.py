"""A norm with a frozen weight, as a function of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nexus_cli.core.kernels.rms_norm import rms_norm, rms_norm_backward


class FrozenNorm(torch.autograd.Function):
    """``x / rms(x) * weight`` with a gradient to ``x`` alone (Zhang and Sennrich, 2019)."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        """The normed rows ``[T, H]``."""
        normed_TH, rstd_T = rms_norm(x_TH, weight_H, epsilon)
        ctx.save_for_backward(x_TH, rstd_T, weight_H)
        return normed_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the input."""
        x_TH, rstd_T, weight_H = ctx.saved_tensors
        return rms_norm_backward(grad_TH.contiguous(), x_TH, rstd_T, weight_H), None, None
