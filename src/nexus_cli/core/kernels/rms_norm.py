"""RMS norm, alone or after a residual sum, and its gradient; the norm's weight is frozen."""

from __future__ import annotations

import torch
from torch import Tensor

# Shape letters in this file: T tokens, H hidden.


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``weight * x / sqrt(mean(x^2) + eps)``, in float32, rounded once.

    Args:
        x_TH: contiguous; bfloat16 or float32 on a GPU, any float dtype on the CPU.
        weight_H: any float dtype.
        eps: added to the mean square.

    Returns:
        The normed rows in the input's dtype, and the factor of each row ``rstd_T``, float32
        (float64 for a float64 input).

    Raises:
        ValueError: if shapes, devices or strides do not fit.
    """
    if _on_gpu(x_TH, weight_H):
        from nexus_cli.core.kernels.triton import rms_norm as kernels

        return kernels.rms_norm(x_TH, weight_H, eps)
    return rms_norm_torch(x_TH, weight_H, eps)


def rms_norm_torch(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm` in PyTorch, on any device."""
    wide_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    rstd_T = torch.rsqrt(wide_TH.square().mean(-1) + eps)
    return (weight_H.to(wide_TH.dtype) * wide_TH * rstd_T[:, None]).to(x_TH.dtype), rstd_T


def add_rms_norm(
    x_TH: Tensor, y_TH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum ``x + y``, rounded to their dtype, and the :func:`rms_norm` of that sum.

    Args:
        x_TH: contiguous; bfloat16 or float32 on a GPU, any float dtype on the CPU.
        y_TH: as ``x_TH``.
        weight_H: any float dtype.
        eps: added to the mean square.

    Returns:
        The sum, the normed sum and ``rstd_T``.

    Raises:
        ValueError: if shapes, devices, dtypes or strides do not fit.
    """
    if _on_gpu(x_TH, weight_H, y_TH):
        from nexus_cli.core.kernels.triton import rms_norm as kernels

        return kernels.add_rms_norm(x_TH, y_TH, weight_H, eps)
    return add_rms_norm_torch(x_TH, y_TH, weight_H, eps)


def add_rms_norm_torch(
    x_TH: Tensor, y_TH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm` in PyTorch, on any device."""
    sum_TH = x_TH + y_TH
    return sum_TH, *rms_norm_torch(sum_TH, weight_H, eps)


def rms_norm_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    rstd_T: Tensor,
    weight_H: Tensor,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """Gradient to the input of :func:`rms_norm`, plus a residual gradient, rounded once.

    Args:
        grad_TH: of the normed rows, contiguous.
        x_TH: what was normed.
        rstd_T: as :func:`rms_norm` returned it.
        weight_H: any float dtype.
        residual_TH: added to the gradient, as it bypassed the norm.

    Returns:
        The gradient, in the dtype of ``x_TH``.

    Raises:
        ValueError: if shapes, devices, dtypes or strides do not fit.
    """
    more = () if residual_TH is None else (residual_TH,)
    if _on_gpu(x_TH, weight_H, grad_TH, *more):
        from nexus_cli.core.kernels.triton import rms_norm as kernels

        return kernels.rms_norm_backward(grad_TH, x_TH, rstd_T, weight_H, residual_TH)
    return rms_norm_backward_torch(grad_TH, x_TH, rstd_T, weight_H, residual_TH)


def rms_norm_backward_torch(
    grad_TH: Tensor,
    x_TH: Tensor,
    rstd_T: Tensor,
    weight_H: Tensor,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """:func:`rms_norm_backward` in PyTorch, on any device."""
    dtype = rstd_T.dtype
    rstd_T1 = rstd_T[:, None]
    unit_TH = x_TH.to(dtype) * rstd_T1
    grad_unit_TH = grad_TH.to(dtype) * weight_H.to(dtype)
    along_T1 = (grad_unit_TH * unit_TH).mean(-1, keepdim=True)
    dx_TH = rstd_T1 * (grad_unit_TH - unit_TH * along_T1)
    if residual_TH is not None:
        dx_TH = dx_TH + residual_TH.to(dtype)
    return dx_TH.to(x_TH.dtype)


def _on_gpu(x_TH: Tensor, weight_H: Tensor, *others_TH: Tensor) -> bool:
    """Whether the Triton kernel is due; raises unless all tensors fit the first."""
    if weight_H.shape != x_TH.shape[1:] or weight_H.device != x_TH.device:
        raise ValueError(f"a weight {tuple(weight_H.shape)} for rows {tuple(x_TH.shape)}")
    for other in others_TH:
        if other.shape != x_TH.shape or other.dtype != x_TH.dtype or other.device != x_TH.device:
            raise ValueError("the tensors differ in shape, dtype or device")
    if x_TH.is_cuda:
        if x_TH.dtype == torch.float64:
            raise ValueError("float64 is for the CPU")
        if not all(tensor.is_contiguous() for tensor in (x_TH, weight_H, *others_TH)):
            raise ValueError("the tensors must be contiguous")
        return True
    if x_TH.device.type != "cpu":
        raise ValueError(f"no kernel for {x_TH.device}")
    return False
