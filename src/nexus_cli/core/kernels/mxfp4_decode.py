"""Packed MXFP4 weights to bf16, exactly (OCP Microscaling Formats v1.0, section 6.3)."""

from __future__ import annotations

import torch
from torch import Tensor

# Shape letters in this file: E experts, N output features, K input features.

HALF_BYTE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_into(blocks: Tensor, scales: Tensor, out_ENK: Tensor) -> None:
    """Write ``code * 2^(scale - 127)`` for every weight.

    Every product is exact in bf16. The scale byte 255, which the format calls NaN, is taken for
    2^128: infinity but for the codes 0 and 0.5.

    Args:
        blocks: uint8 ``[E, N, K/32, 16]``; the low nibble of byte j is element 2j. Contiguous.
        scales: uint8 ``[E, N, K/32]``, in either order of its last two axes
            (:func:`order_scales`).
        out_ENK: bf16 ``[E, N, K]`` on the same device; on a CPU of any float dtype.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit together.
    """
    _check(blocks, scales, out_ENK)
    if not blocks.is_cuda:
        decode_into_torch(blocks, scales, out_ENK)
        return
    if out_ENK.dtype != torch.bfloat16:
        raise ValueError(f"a GPU decodes into bfloat16, not {out_ENK.dtype}")
    from nexus_cli.core.kernels.triton import mxfp4_decode as kernels

    kernels.decode_into(blocks, scales, out_ENK)


def decode_into_torch(blocks: Tensor, scales: Tensor, out_ENK: Tensor) -> None:
    """:func:`decode_into` in PyTorch, on any device and into any float dtype."""
    table = torch.tensor(HALF_BYTE, dtype=torch.float64, device=blocks.device)
    table = torch.cat((table, -table))
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    factor = torch.exp2(scales.double() - 127)
    weight = table[codes.int()] * factor[..., None]
    out_ENK.copy_(weight.flatten(-2))


def _check(blocks: Tensor, scales: Tensor, out_ENK: Tensor) -> None:
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"packed weights are uint8, not {blocks.dtype} and {scales.dtype}")
    if blocks.shape[-1] != 16 or scales.shape != blocks.shape[:-1]:
        raise ValueError(f"blocks {tuple(blocks.shape)} do not fit scales {tuple(scales.shape)}")
    expected = (*scales.shape[:-1], scales.shape[-1] * 32)
    if out_ENK.shape != expected:
        raise ValueError(f"the weights are {expected}, not {tuple(out_ENK.shape)}")
    if not blocks.device == scales.device == out_ENK.device:
        raise ValueError("blocks, scales and weights must be on one device")
    if not (blocks.is_contiguous() and out_ENK.is_contiguous()):
        raise ValueError("blocks and weights must be contiguous")
    require_scale_order(scales)


def order_scales(scales: Tensor) -> Tensor:
    """The same scales ``[E, N, K/32]`` with those of neighbouring features side by side.

    A tile of a product takes a few scales of each of many features. In the checkpoint's order
    those are single bytes 90 apart; in this one they are copied 16 at a time.
    """
    return scales.transpose(1, 2).contiguous().transpose(1, 2)


def require_scale_order(scales: Tensor) -> None:
    """Raise ValueError unless each expert's scales lie together, in one of two orders."""
    experts, features, groups = scales.shape
    orders = {(features * groups, groups, 1), (features * groups, 1, features)}
    if experts and features > 1 and groups > 1 and scales.stride() not in orders:
        raise ValueError(f"scales with the strides {scales.stride()} are in no known order")
