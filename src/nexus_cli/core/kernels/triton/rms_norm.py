"""RMS norm and its gradient: one row a program, held in registers between the two passes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape letters in this file: T tokens, H hidden.

WARPS = 4


@triton.jit
def norm_kernel(
    x,
    y,  # added to x first; None for the plain norm
    weight,
    total,  # receives x + y
    normed,
    rstds,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normed rows; with ``y``, of the sum, which is kept."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    place = row.to(tl.int64) * H + columns
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    factor = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    if y is not None:
        value += tl.load(y + place, inside, 0.0).to(tl.float32)
        # Rounded here, as the norm is that of the sum which is kept.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, inside)
        value = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, 0) / H + eps)
    tl.store(rstds + row, rstd)
    tl.store(normed + place, (factor * (value * rstd)).to(normed.dtype.element_ty), inside)


@triton.jit
def norm_backward_kernel(
    grad,
    x,
    rstds,
    weight,
    residual,  # None if nothing is to be added
    dx,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient to what was normed."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    place = row.to(tl.int64) * H + columns
    rstd = tl.load(rstds + row)
    unit = tl.load(x + place, inside, 0.0).to(tl.float32) * rstd
    along = tl.load(grad + place, inside, 0.0).to(tl.float32)
    along *= tl.load(weight + columns, inside, 0.0).to(tl.float32)
    if residual is not None:  # read before the reduction, to wait for memory once
        more = tl.load(residual + place, inside, 0.0).to(tl.float32)
    result = rstd * (along - unit * (tl.sum(along * unit, 0) / H))
    if residual is not None:
        result += more
    tl.store(dx + place, result.to(dx.dtype.element_ty), inside)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`nexus_cli.core.kernels.rms_norm.rms_norm`."""
    tokens, hidden = x_TH.shape
    normed_TH = torch.empty_like(x_TH)
    rstd_T = x_TH.new_empty(tokens, dtype=torch.float32)
    norm_kernel[(tokens,)](
        x_TH,
        None,
        weight_H,
        None,
        normed_TH,
        rstd_T,
        eps,
        H=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        num_warps=WARPS,
    )
    return normed_TH, rstd_T


def add_rms_norm(
    x_TH: Tensor, y_TH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`nexus_cli.core.kernels.rms_norm.add_rms_norm`."""
    tokens, hidden = x_TH.shape
    sum_TH, normed_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    rstd_T = x_TH.new_empty(tokens, dtype=torch.float32)
    norm_kernel[(tokens,)](
        x_TH,
        y_TH,
        weight_H,
        sum_TH,
        normed_TH,
        rstd_T,
        eps,
        H=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        num_warps=WARPS,
    )
    return sum_TH, normed_TH, rstd_T


def rms_norm_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    rstd_T: Tensor,
    weight_H: Tensor,
    residual_TH: Tensor | None,
) -> Tensor:
    """See :func:`nexus_cli.core.kernels.rms_norm.rms_norm_backward`."""
    tokens, hidden = x_TH.shape
    dx_TH = torch.empty_like(x_TH)
    norm_backward_kernel[(tokens,)](
        grad_TH,
        x_TH,
        rstd_T,
        weight_H,
        residual_TH,
        dx_TH,
        H=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        num_warps=WARPS,
    )
    return dx_TH
