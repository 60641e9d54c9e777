"""One AdamW step on a matrix whose master is split in two and whose moments take 8 bits each.

**The master.** An fp32 number ``w`` is the bf16 weight ``b`` that the model computes with, and a
16-bit remainder ``r``, with ``bits(w) = 65536 bits(b) + r`` as integers. ``b`` is ``w`` rounded to
nearest, a half away from zero: then ``r``, between -32768 and 32767, is just the low half of
``bits(w)`` read as a signed number. (Ties to even would need -32768 for two different numbers.)
The pair gives ``w`` back exactly, whatever it is; a ``w`` too large for bf16 shows as an infinite
``b``, and every NaN is kept as one and the same NaN.

**The moments.** Blocks of 256 numbers share an fp32 scale, the largest magnitude in the block, as
in 8-bit Optimizers via Block-wise Quantization (Dettmers and others, arXiv 2110.02861). The codes
are ours, even steps of the fourth root, so that a step is fine near the block's largest number
and relatively coarser below, over five decades:

    first moment     m = scale sign(c) (c / 127)^4             c = -127 .. 127
    second moment    sqrt(v) = scale ((c + 17) / 272)^4        c = 0 .. 255

Kept is the root of the second moment, as that is what an update divides by. Its smallest code is
``2^-16`` of the scale and never zero: a root that underflowed under a first moment that did not
would make a huge step. (With the dynamic map of the paper, numbers spread over four decades in a
block did that in a simulation; these codes err by 3 to 5 % of an update at usual spreads.)
Rounding is to nearest, so two runs are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape letters in this file: N numbers of a matrix, G = ceil(N / 256) blocks.

BLOCK = 256
FIRST_TOP = 127  # the first moment's largest code
SECOND_LOW, SECOND_STEPS = 17, 272  # (0 + 17) / 272 = 1/16, (255 + 17) / 272 = 1
SMALLEST = 2.0**-126  # scales below this count as zero; their inverse would overflow
NAN_BITS = 0x7FC0


class Moments(NamedTuple):
    """Both moments of a matrix, flat.

    Attributes:
        first_N: int8 codes of the first moment.
        first_scale_G: float32, a block's largest magnitude.
        second_N: uint8 codes of the root of the second moment.
        second_scale_G: float32, a block's largest root.
    """

    first_N: Tensor
    first_scale_G: Tensor
    second_N: Tensor
    second_scale_G: Tensor

    @classmethod
    def zeros(cls, count: int, device: torch.device) -> Moments:
        """Moments of ``count`` numbers before the first step."""
        blocks = -(-count // BLOCK)
        return cls(
            torch.zeros(count, dtype=torch.int8, device=device),
            torch.zeros(blocks, device=device),
            torch.zeros(count, dtype=torch.uint8, device=device),
            torch.zeros(blocks, device=device),
        )


@dataclass(frozen=True)
class Factors:
    """Numbers of one step, the same for all of a group.

    Attributes:
        decay: what decoupled weight decay leaves of a weight, ``1 - lr weight_decay``.
        step_size: ``lr / (1 - beta1^t)``.
        root_factor: ``1 / sqrt(1 - beta2^t)``.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the corrected root of the second moment.
    """

    decay: float
    step_size: float
    root_factor: float
    beta1: float
    beta2: float
    epsilon: float

    @classmethod
    def at(
        cls,
        step: int,
        *,
        rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        epsilon: float,
    ) -> Factors:
        """The factors of step ``step``, counted from 1, as ``torch.optim.AdamW`` has them."""
        beta1, beta2 = betas
        return cls(
            decay=1 - rate * weight_decay,
            step_size=rate / (1 - beta1**step),
            root_factor=(1 - beta2**step) ** -0.5,
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
        )


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as bf16 weights and int16 remainders of the same shape."""
    bits = master.contiguous().view(torch.int32)
    weight = ((bits + 0x8000) >> 16).to(torch.int16)
    broken = master.isnan()
    weight = weight.masked_fill(broken, NAN_BITS)
    return weight.view(torch.bfloat16), bits.to(torch.int16).masked_fill(broken, 0)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that :func:`split_master` took apart."""
    bits = (weight.contiguous().view(torch.int16).int() << 16) + remainder.int()
    return bits.view(torch.float32)


def adamw_8bit_step(
    weight: Tensor,
    remainder: Tensor,
    moments: Moments,
    grad: Tensor,
    factors: Factors,
    grad_factor: Tensor | None = None,
) -> None:
    """Take one step in place, in one pass over memory.

    Args:
        weight: bf16, contiguous, any shape of N numbers.
        remainder: int16, of the same shape: the low halves of the masters.
        moments: of the N numbers.
        grad: bf16 or fp32, of the same shape.
        factors: of this step.
        grad_factor: float32 ``[]`` to multiply the gradient by, such as a clipping factor.

    Raises:
        ValueError: a format, layout or device is none of these.
    """
    _check(weight, remainder, moments, grad, grad_factor)
    if weight.is_cuda:
        from nexus_cli.core.kernels.triton.adamw_8bit import adamw_8bit_triton

        adamw_8bit_triton(weight, remainder, moments, grad.contiguous(), factors, grad_factor)
    else:
        adamw_8bit_torch(weight, remainder, moments, grad, factors, grad_factor)


@torch.no_grad()
def adamw_8bit_torch(
    weight: Tensor,
    remainder: Tensor,
    moments: Moments,
    grad: Tensor,
    factors: Factors,
    grad_factor: Tensor | None = None,
) -> None:
    """:func:`adamw_8bit_step` in PyTorch, on any device, with the same roundings."""
    gradient = _blocks(grad.float() if grad_factor is None else grad.float() * grad_factor)
    first = decode_first(moments.first_N, moments.first_scale_G)
    root = decode_root(moments.second_N, moments.second_scale_G)
    first = factors.beta1 * first + (1 - factors.beta1) * gradient
    second = factors.beta2 * (root * root) + (1 - factors.beta2) * (gradient * gradient)
    root = _root(second)
    change = first / (root * factors.root_factor + factors.epsilon)
    master = _blocks(join_master(weight, remainder))
    master = master * factors.decay - factors.step_size * change
    parts = split_master(master.flatten()[: weight.numel()].view_as(weight))
    weight.copy_(parts[0])
    remainder.copy_(parts[1])
    for kept, new in zip(moments, (*encode_first(first), *encode_root(root)), strict=True):
        kept.copy_(new.flatten()[: kept.numel()])


def decode_first(code_N: Tensor, scale_G: Tensor) -> Tensor:
    """First moments ``[G, 256]``, zero after the last."""
    code = _blocks(code_N.float())
    part = code * (1 / FIRST_TOP)
    magnitude = (part * part) * (part * part)
    return torch.where(code < 0, -magnitude, magnitude) * scale_G[:, None]


def decode_root(code_N: Tensor, scale_G: Tensor) -> Tensor:
    """Roots of the second moments ``[G, 256]``; what is after the last means nothing."""
    part = (_blocks(code_N.float()) + SECOND_LOW) * (1 / SECOND_STEPS)
    return (part * part) * (part * part) * scale_G[:, None]


def encode_first(first_GB: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[G, 256]`` and scales ``[G]`` of first moments."""
    scale_G = first_GB.abs().amax(dim=1)
    part = _root(_root(first_GB.abs() * _inverse(scale_G)[:, None]))
    code = (part * FIRST_TOP + 0.5).to(torch.int32).clamp(max=FIRST_TOP)
    return torch.where(first_GB < 0, -code, code).to(torch.int8), scale_G


def encode_root(root_GB: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[G, 256]`` and scales ``[G]`` of roots of second moments."""
    scale_G = root_GB.amax(dim=1)
    part = _root(_root(root_GB * _inverse(scale_G)[:, None]))
    code = (part * SECOND_STEPS + 0.5).to(torch.int32) - SECOND_LOW
    return code.clamp(0, 255).to(torch.uint8), scale_G


def _root(numbers: Tensor) -> Tensor:
    """Square roots rounded to nearest, as a GPU has them; a CPU's own may miss by the last bit."""
    return numbers.double().sqrt().float()


def _inverse(scale_G: Tensor) -> Tensor:
    return torch.where(scale_G >= SMALLEST, 1 / scale_G, torch.zeros_like(scale_G))


def _blocks(numbers: Tensor) -> Tensor:
    """``[G, 256]``, filled up with zeros."""
    flat = numbers.reshape(-1)
    return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _check(
    weight: Tensor, remainder: Tensor, moments: Moments, grad: Tensor, grad_factor: Tensor | None
) -> None:
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"adamw-8bit runs on the CPU and on CUDA, not on {weight.device}")
    count, blocks = weight.numel(), -(-weight.numel() // BLOCK)
    if not 0 < count < 2**31 - BLOCK:
        raise ValueError(f"adamw-8bit takes tensors of 1 to 2^31 - 257 numbers, not {count}")
    wanted: list[tuple[str, Tensor, torch.dtype, int]] = [
        ("weight", weight, torch.bfloat16, count),
        ("remainder", remainder, torch.int16, count),
        ("first moment", moments.first_N, torch.int8, count),
        ("first moment's scale", moments.first_scale_G, torch.float32, blocks),
        ("second moment", moments.second_N, torch.uint8, count),
        ("second moment's scale", moments.second_scale_G, torch.float32, blocks),
    ]
    if grad_factor is not None:
        wanted.append(("gradient's factor", grad_factor, torch.float32, 1))
    for name, tensor, dtype, size in wanted:
        if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(f"the {name} must be {size} contiguous numbers of {dtype}")
    if grad.dtype not in (torch.bfloat16, torch.float32) or grad.shape != weight.shape:
        raise ValueError(f"the gradient must be bfloat16 or float32 of {list(weight.shape)}")
    if any(tensor.device != weight.device for _, tensor, *_ in wanted) or (
        grad.device != weight.device
    ):
        raise ValueError("the optimizer's tensors are on several devices")
