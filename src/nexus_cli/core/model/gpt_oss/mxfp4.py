"""MXFP4, four-bit codes in blocks of 32 that share one exponent: packed, added up, picked out."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import FP4_VALUES

# Shape letters in this file: N output features, K input features, B blocks of 32 input features
# (B = K / 32).

BLOCK_SIZE = 32
EXPONENT_BIAS = 127
_LARGEST_EXPONENT = 254 - EXPONENT_BIAS  # E8M0 code 255 is NaN in the OCP format
_FP4_MAX_EXPONENT = 2  # the largest FP4 value is 6 = 1.5 * 2**2


def add_mxfp4_(total_NK: Tensor, blocks: Tensor, scales: Tensor) -> None:
    """Add packed weights to a sum, in place. Each product is exact, each addition rounds once.

    It needs 12 bytes of memory a weight; for few rows those stay in a core's cache.

    Args:
        total_NK: float32, contiguous, on the CPU.
        blocks: uint8 ``[N, K / 32, 16]``, as :func:`quantize_mxfp4` gives them.
        scales: uint8 ``[N, K / 32]``. Code 255 is no number, and makes the sum none.
    """
    pairs, powers = _tables()
    values = pairs.index_select(0, blocks.reshape(-1).int()).view(torch.float32)
    powers_NB = powers.index_select(0, scales.reshape(-1).int()).view(scales.shape)
    sums_NBK = total_NK.view(*scales.shape, BLOCK_SIZE)
    sums_NBK.addcmul_(values.view(sums_NBK.shape), powers_NB.unsqueeze(-1))


def decode_columns(blocks: Tensor, scales: Tensor, columns_U: Tensor) -> Tensor:
    """Chosen columns of a packed weight, exactly; the others are not decoded.

    Args:
        blocks: uint8 ``[N, K / 32, 16]``, on the CPU.
        scales: uint8 ``[N, K / 32]``.
        columns_U: indices below ``K``, int64, in any order.

    Returns:
        float32 ``[N, U]``.
    """
    byte_NU = blocks.flatten(1).index_select(1, columns_U // 2)
    odd_U = (columns_U % 2).bool()
    code_NU = torch.where(odd_U, byte_NU >> 4, byte_NU & 15).int()
    power_NU = scales.index_select(1, columns_U // BLOCK_SIZE).int()
    values_NU = torch.tensor(FP4_VALUES).index_select(0, code_NU.flatten())
    values_NU *= _tables()[1].index_select(0, power_NU.flatten())
    return values_NU.view(code_NU.shape)


@cache
def _tables() -> tuple[Tensor, Tensor]:
    """By byte: its two values, as one float64 that is never computed with, and its power of two."""
    byte = torch.arange(256)
    values = torch.tensor(FP4_VALUES)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=-1).view(torch.float64)
    return pairs.flatten(), torch.exp2(byte.double() - EXPONENT_BIAS).float()


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight into FP4 codes and shared exponents, as GPT-OSS checkpoints hold them.

    Each block takes the exponent with the smaller squared error of two: the OCP choice
    ``floor(log2(amax)) - 2``, which saturates values above six, and the one above it, which
    does not. Values round to the nearest code, ties to the even code, and saturate at six.

    Args:
        weight: finite floats ``[..., K]``, ``K`` (the input axis) a multiple of 32.

    Returns:
        ``blocks`` uint8 ``[..., K / 32, 16]``: byte ``j`` holds element ``2j`` in its low nibble
        and ``2j + 1`` in its high nibble; ``scales`` uint8 ``[..., K / 32]``: exponent + 127.

    Raises:
        ValueError: ``K`` is not a multiple of 32, or a value is not finite.
    """
    if weight.ndim == 0 or weight.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"the last axis must be a multiple of {BLOCK_SIZE}: {list(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("MXFP4 holds finite values only")
    values = weight.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    values = values.unflatten(-1, (-1, BLOCK_SIZE))  # [..., B, 32]
    low = _ocp_exponent(values)
    high = (low + 1).clamp(max=_LARGEST_EXPONENT)
    codes_low, error_low = _encode(values, low)
    codes_high, error_high = _encode(values, high)
    # The two errors are in units of their own scale: 2**(2 * low) and four times that.
    use_high = 4 * error_high < error_low
    codes = torch.where(use_high.unsqueeze(-1), codes_high, codes_low)
    exponent = torch.where(use_high, high, low)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks, (exponent + EXPONENT_BIAS).to(torch.uint8)


def _ocp_exponent(values: Tensor) -> Tensor:
    """``floor(log2(amax)) - 2`` of each block, int32 ``[..., B]``; 0 for a block of zeros."""
    largest = values.abs().amax(-1)
    # frexp's exponent is floor(log2(x)) + 1, exactly, where log2 could round up.
    exponent = torch.frexp(largest).exponent - 1 - _FP4_MAX_EXPONENT
    exponent = exponent.clamp(min=-EXPONENT_BIAS, max=_LARGEST_EXPONENT)
    return torch.where(largest == 0, torch.zeros_like(exponent), exponent)


def _encode(values: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[..., B, 32]`` at a given exponent, and each block's squared error.

    The error is in units of ``2**(2 * exponent)``.
    """
    scaled = torch.ldexp(values, -exponent.unsqueeze(-1))
    size = scaled.abs()
    # Midpoints between 0, .5, 1, 1.5, 2, 3, 4, 6. A tie goes to the even code: strict
    # comparison where the even code lies below the midpoint, inclusive where it lies above.
    code = (size > 0.25).to(torch.uint8)
    code += size >= 0.75
    code += size > 1.25
    code += size >= 1.75
    code += size > 2.5
    code += size >= 3.5
    code += size > 5.0
    small = code.to(size.dtype) * 0.5
    decoded = torch.where(code < 4, small, code.to(size.dtype) - 2)
    decoded = torch.where(code == 7, torch.full_like(size, 6.0), decoded)
    error = (decoded - size).square().sum(-1)
    negative = (scaled < 0) & (code > 0)
    return code | (negative.to(torch.uint8) << 3), error
