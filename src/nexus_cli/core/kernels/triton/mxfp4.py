"""Decoding MXFP4 in registers: device functions that every kernel over packed weights shares."""

from __future__ import annotations

import triton
import triton.language as tl

# A four-bit code n has a sign, two exponent bits and one of mantissa. n * 0x1040 has its magnitude
# where bf16 keeps the lowest exponent bits and the highest bit of mantissa, and its sign where bf16
# keeps it; a mask drops the rest. That reads as the code's value times 2^-126 (0.5 lands on a
# subnormal, which multiplication keeps), so one product with 2^(s - 1) is the weight, exactly, for
# every scale byte s up to 128. Two factors, 2^floor((s - 1) / 2) and 2^floor(s / 2), do for all
# 256. A product is a fused multiply-add of -0: sm_80 has no other in bf16.
#
# Four bytes at a time; a byte's two weights share a register in their final order. Each byte brings
# its own factor, twice in a register, since a layout may put bytes of several rows side by side. (A
# selector of 8 in prmt repeats a sign bit that is 0.)
NARROW: tl.constexpr = tl.constexpr("""
{
.reg .b32 l, h, t, z;
mov.b32 z, 0x80008000;
and.b32 l, $4, 0x0F0F0F0F;
shr.u32 h, $4, 4;
and.b32 h, h, 0x0F0F0F0F;
prmt.b32 t, l, h, 0x8480; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 $0, t, $5, z;
prmt.b32 t, l, h, 0x8581; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 $1, t, $6, z;
prmt.b32 t, l, h, 0x8682; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 $2, t, $7, z;
prmt.b32 t, l, h, 0x8783; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 $3, t, $8, z;
}
""")
WIDE: tl.constexpr = tl.constexpr("""
{
.reg .b32 l, h, t, z;
mov.b32 z, 0x80008000;
and.b32 l, $4, 0x0F0F0F0F;
shr.u32 h, $4, 4;
and.b32 h, h, 0x0F0F0F0F;
prmt.b32 t, l, h, 0x8480; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 t, t, $5, z; fma.rn.bf16x2 $0, t, $9, z;
prmt.b32 t, l, h, 0x8581; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 t, t, $6, z; fma.rn.bf16x2 $1, t, $10, z;
prmt.b32 t, l, h, 0x8682; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 t, t, $7, z; fma.rn.bf16x2 $2, t, $11, z;
prmt.b32 t, l, h, 0x8783; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 t, t, $8, z; fma.rn.bf16x2 $3, t, $12, z;
}
""")


@triton.jit
def spread(scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[ROWS, COLUMNS/32]`` to one for each byte, ``[ROWS, COLUMNS/2]``."""
    each = tl.broadcast_to(scale[:, :, None], (ROWS, COLUMNS // 32, 16))
    return tl.reshape(each, (ROWS, COLUMNS // 2))


@triton.jit
def power_pair(exponent):
    """bf16 ``2^(exponent - 127)``, twice in an int32."""
    return (exponent << 7) * 0x10001


@triton.jit
def decode(packed, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr):
    """Weights ``[ROWS, COLUMNS]`` from bytes ``[ROWS, COLUMNS/2]``, scales ``[ROWS, COLUMNS/32]``.

    ``MODE`` is ``narrow`` (scale bytes up to 128) or ``wide`` in bf16, or ``float32`` (up to 128,
    without assembly).
    """
    power = scale.to(tl.int32)
    if MODE == "float32":
        code = packed.to(tl.int32)
        factor = spread(((power + 126) << 23).to(tl.float32, bitcast=True), ROWS, COLUMNS)
        low = (((code & 0x07) << 22) | ((code & 0x08) << 28)).to(tl.float32, bitcast=True) * factor
        high = (((code & 0x70) << 18) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True) * factor
    else:
        if MODE == "narrow":
            pairs = tl.inline_asm_elementwise(
                NARROW,
                constraints="=r,=r,=r,=r,r,r,r,r,r",
                args=[packed, spread(power_pair(power + 126), ROWS, COLUMNS)],
                dtype=tl.int32,
                is_pure=True,
                pack=4,
            )
        else:
            pairs = tl.inline_asm_elementwise(
                WIDE,
                constraints="=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
                args=[
                    packed,
                    spread(power_pair((power + 253) >> 1), ROWS, COLUMNS),
                    spread(power_pair((power + 254) >> 1), ROWS, COLUMNS),
                ],
                dtype=tl.int32,
                is_pure=True,
                pack=4,
            )
        low = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), (ROWS, COLUMNS))
