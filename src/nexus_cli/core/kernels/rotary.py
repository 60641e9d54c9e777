"""Rotary position embedding in place, on the q and k columns of a fused projection."""

from __future__ import annotations

import torch
from torch import Tensor

# Shape letters in this file: T tokens, D columns of the projection, R half a head.


def rotate_(
    qkv_TD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    inverse: bool = False,
) -> None:
    """Rotate the first ``num_heads`` heads of every row, in place.

    A head's halves become ``first cos - second sin`` and ``second cos + first sin``, computed in
    float32 and rounded once.

    Args:
        qkv_TD: rows may be strided, columns not; heads to rotate come first.
        cos_TR: float32, contiguous (float64 with float64 rows); YaRN's attention factor
            multiplies it.
        sin_TR: likewise.
        num_heads: heads of q plus heads of k.
        head_dim: 2R.
        inverse: apply the transpose instead. That is the gradient, factor included, and the
            inverse only if the factor is 1.

    Raises:
        ValueError: if shapes, devices, dtypes or strides do not fit.
    """
    if _on_gpu(qkv_TD, cos_TR, sin_TR, num_heads, head_dim):
        from nexus_cli.core.kernels.triton import rotary as kernels

        kernels.rotate_(qkv_TD, cos_TR, sin_TR, num_heads, head_dim, inverse)
    else:
        rotate_torch_(
            qkv_TD, cos_TR, sin_TR, num_heads=num_heads, head_dim=head_dim, inverse=inverse
        )


def rotate_torch_(
    qkv_TD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    inverse: bool = False,
) -> None:
    """:func:`rotate_` in PyTorch, on any device."""
    dtype = torch.promote_types(qkv_TD.dtype, torch.float32)
    heads = qkv_TD[:, : num_heads * head_dim].view(len(qkv_TD), num_heads, 2, head_dim // 2)
    first, second = heads.to(dtype).unbind(2)
    cos, sin = cos_TR.to(dtype)[:, None], sin_TR.to(dtype)[:, None]
    if inverse:
        sin = -sin
    # Both before either is written: without a cast these are views.
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=2)
    heads.copy_(rotated)


def _on_gpu(qkv_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, num_heads: int, head_dim: int) -> bool:
    """Whether the Triton kernel is due; raises unless the tensors fit."""
    if qkv_TD.shape[1] < num_heads * head_dim:
        raise ValueError(f"{num_heads} heads of {head_dim} in {qkv_TD.shape[1]} columns")
    shape = (qkv_TD.shape[0], head_dim // 2)
    for table in (cos_TR, sin_TR):
        if table.shape != shape or table.device != qkv_TD.device:
            raise ValueError(f"cosine and sine must be {shape}, on the device of the rows")
    if qkv_TD.is_cuda:
        if qkv_TD.dtype == torch.float64:
            raise ValueError("float64 is for the CPU")
        if qkv_TD.stride(1) != 1 or not (cos_TR.is_contiguous() and sin_TR.is_contiguous()):
            raise ValueError("columns, cosine and sine must be contiguous")
        return True
    if qkv_TD.device.type != "cpu":
        raise ValueError(f"no kernel for {qkv_TD.device}")
    return False
