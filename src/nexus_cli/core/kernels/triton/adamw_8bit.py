"""The AdamW step of ``core.kernels.adamw_8bit`` in one pass: 14 bytes a number with bf16 gradients.

The update's multiplications and additions are kept apart (no fused multiply-add), its root and its
quotient are rounded to nearest: masters and scales are those of the PyTorch twin bit for bit as
long as the codes are. The fourth roots that choose the codes are the hardware's, a few times
cheaper; a number that lies on the border of two codes may get the other one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nexus_cli.core.kernels.adamw_8bit import BLOCK, Factors, Moments

ROWS = 4  # blocks a program, one a warp
WARPS = 4


@triton.jit
def adamw_8bit_kernel(
    weight_ptr,
    remainder_ptr,
    first_ptr,
    first_scale_ptr,
    second_ptr,
    second_scale_ptr,
    grad_ptr,
    grad_factor_ptr,
    count,
    decay,
    step_size,
    root_factor,
    beta1,
    rest1,
    beta2,
    rest2,
    epsilon,
    HAS_FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows are blocks of 256 numbers; weights come as the 16 bits of their bf16 form."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row_R[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = place < count
    row_inside_R = row_R * BLOCK < count

    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        grad = grad * tl.load(grad_factor_ptr)
    first_code = tl.load(first_ptr + place, mask=inside, other=0).to(tl.float32)
    root_code = tl.load(second_ptr + place, mask=inside, other=0).to(tl.float32)
    first_scale_R = tl.load(first_scale_ptr + row_R, mask=row_inside_R, other=0.0)
    root_scale_R = tl.load(second_scale_ptr + row_R, mask=row_inside_R, other=0.0)

    part = first_code * (1.0 / 127)
    magnitude = (part * part) * (part * part)
    first = tl.where(first_code < 0, -magnitude, magnitude) * first_scale_R[:, None]
    part = (root_code + 17.0) * (1.0 / 272)
    root = (part * part) * (part * part) * root_scale_R[:, None]

    first = beta1 * first + rest1 * grad
    root = tl.sqrt_rn(beta2 * (root * root) + rest2 * (grad * grad))
    change = tl.div_rn(first, root * root_factor + epsilon)

    high = tl.load(weight_ptr + place, mask=inside, other=0).to(tl.int32)
    low = tl.load(remainder_ptr + place, mask=inside, other=0).to(tl.int32)
    master = ((high << 16) + low).to(tl.float32, bitcast=True)
    master = master * decay - step_size * change
    bits = master.to(tl.int32, bitcast=True)
    broken = master != master
    high = tl.where(broken, 0x7FC0, (bits + 0x8000) >> 16)
    low = tl.where(broken, 0, bits)
    tl.store(weight_ptr + place, high.to(tl.int16), mask=inside)
    tl.store(remainder_ptr + place, low.to(tl.int16), mask=inside)

    first_scale_R = tl.max(tl.abs(first), axis=1)
    root_scale_R = tl.max(root, axis=1)
    smallest = 1.1754943508222875e-38
    # The denominator is never zero, so that no division is made whose result is thrown away.
    first_inverse_R = tl.where(
        first_scale_R >= smallest, tl.div_rn(1.0, tl.maximum(first_scale_R, smallest)), 0.0
    )
    root_inverse_R = tl.where(
        root_scale_R >= smallest, tl.div_rn(1.0, tl.maximum(root_scale_R, smallest)), 0.0
    )
    part = tl.sqrt(tl.sqrt(tl.abs(first) * first_inverse_R[:, None]))
    code = tl.minimum((part * 127.0 + 0.5).to(tl.int32), 127)
    code = tl.where(first < 0, -code, code)
    tl.store(first_ptr + place, code.to(tl.int8), mask=inside)
    tl.store(first_scale_ptr + row_R, first_scale_R, mask=row_inside_R)
    part = tl.sqrt(tl.sqrt(root * root_inverse_R[:, None]))
    code = (part * 272.0 + 0.5).to(tl.int32) - 17
    code = tl.minimum(tl.maximum(code, 0), 255)
    tl.store(second_ptr + place, code.to(tl.uint8), mask=inside)
    tl.store(second_scale_ptr + row_R, root_scale_R, mask=row_inside_R)


def adamw_8bit_triton(
    weight: Tensor,
    remainder: Tensor,
    moments: Moments,
    grad: Tensor,
    factors: Factors,
    grad_factor: Tensor | None = None,
) -> None:
    """Launch the kernel on one contiguous tensor; see ``adamw_8bit_step``."""
    count = weight.numel()
    grid = (triton.cdiv(triton.cdiv(count, BLOCK), ROWS),)
    adamw_8bit_kernel[grid](
        weight.detach().view(torch.int16),
        remainder,
        *moments,
        grad,
        grad if grad_factor is None else grad_factor,
        count,
        factors.decay,
        factors.step_size,
        factors.root_factor,
        factors.beta1,
        1 - factors.beta1,
        factors.beta2,
        1 - factors.beta2,
        factors.epsilon,
        HAS_FACTOR=grad_factor is not None,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
