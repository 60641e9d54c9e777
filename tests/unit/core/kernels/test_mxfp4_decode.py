"""The decoding twin against the model's own, and the kernel's assembly, run by hand."""

import re

import pytest
import torch

from nexus_cli.core.kernels.mxfp4_decode import (
    decode_into,
    decode_into_torch,
    order_scales,
)
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4

MASK = 0xFFFFFFFF


def every_pair():
    """Blocks whose bytes are all 256, under each of the 256 scales."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.arange(256).to(torch.uint8)
    return (
        blocks.expand(1, 256, 16, 16).contiguous(),
        scales[None, :, None].expand(1, 256, 16).contiguous(),
    )


def test_every_byte_and_scale_as_the_model_decodes_them():
    blocks, scales = every_pair()
    out = torch.full((1, 256, 512), float("nan"), dtype=torch.bfloat16)
    decode_into(blocks, scales, out)
    assert torch.equal(out, dequantize_mxfp4(blocks, scales))


def test_some_experts_into_a_slice():
    blocks, scales = every_pair()
    blocks, scales = blocks.view(4, 64, 16, 16), scales.view(4, 64, 16)
    out = torch.zeros(4, 64, 512, dtype=torch.bfloat16)
    decode_into(blocks[1:3], scales[1:3], out[1:3])
    assert torch.equal(out[1:3], dequantize_mxfp4(blocks[1:3], scales[1:3]))
    assert not out[0].any()
    assert not out[3].any()


def test_the_order_of_the_scales_changes_no_value():
    torch.manual_seed(0)
    scales = torch.randint(0, 256, (3, 10, 4), dtype=torch.uint8)
    ordered = order_scales(scales)
    assert torch.equal(ordered, scales)
    assert ordered.stride() == (40, 1, 10)


@pytest.mark.parametrize(
    ("blocks", "scales", "out"),
    [
        (torch.zeros(1, 2, 2, 16), (1, 2, 2), (1, 2, 64)),
        (torch.zeros(1, 2, 2, 16, dtype=torch.uint8), (1, 2, 3), (1, 2, 64)),
        (torch.zeros(1, 2, 2, 16, dtype=torch.uint8), (1, 2, 2), (1, 2, 32)),
        (torch.zeros(1, 2, 2, 32, dtype=torch.uint8)[..., ::2], (1, 2, 2), (1, 2, 64)),
    ],
)
def test_what_does_not_fit_is_refused(blocks, scales, out):
    with pytest.raises(ValueError, match=r"."):
        decode_into(blocks, torch.zeros(scales, dtype=torch.uint8), torch.zeros(out))


def power_pair(exponent):
    return (exponent << 7) * 0x10001


@pytest.mark.parametrize(("mode", "scales"), [("NARROW", 129), ("WIDE", 256)])
def test_the_assembly_gives_the_exact_weight_of_every_byte_and_scale(mode, scales):
    # No GPU runs here, and the interpreter knows no assembly: so its few instructions are run in
    # Python, for every byte in each of the four places, with scales that differ among them.
    pytest.importorskip("triton")
    from nexus_cli.core.kernels.triton import mxfp4

    byte = torch.arange(256)
    packed = torch.stack((byte, (byte * 7 + 3) % 256, 255 - byte, (byte * 31 + 5) % 256), -1)
    word = (packed << torch.tensor([0, 8, 16, 24])).sum(-1)
    scale = torch.arange(scales)
    word, scale = (t.reshape(-1) for t in torch.broadcast_tensors(word[:, None], scale[None, :]))
    each = torch.stack((scale, scale.roll(1), scale.roll(2), scale.roll(3)), -1)
    registers = {"$4": word}
    for place in range(4):
        if mode == "NARROW":
            registers[f"${5 + place}"] = power_pair(each[:, place] + 126)
        else:
            registers[f"${5 + place}"] = power_pair((each[:, place] + 253) >> 1)
            registers[f"${9 + place}"] = power_pair((each[:, place] + 254) >> 1)
    outputs = execute(getattr(mxfp4, mode).value, registers)
    table = torch.empty(1, 256, 512, dtype=torch.bfloat16)
    decode_into_torch(*every_pair(), table)
    table = table.view(256, 256, 2)  # by scale, by byte
    bytes_ = packed[:, None, :].expand(256, scales, 4).reshape(-1, 4)
    for place, pair in enumerate(outputs):
        ours = torch.stack((as_bf16(pair & 0xFFFF), as_bf16(pair >> 16)), -1)
        exact = table[each[:, place], bytes_[:, place]]
        assert torch.equal(ours, exact)
        assert torch.equal(ours.signbit(), exact.signbit())


def execute(assembly, registers):
    """Run the assembly on tensors of unsigned words; returns the four outputs."""
    for line in assembly.replace("{", "").replace("}", "").split(";"):
        words = re.split(r"[\s,]+", line.strip())
        if words[0] and words[0] != ".reg":
            name, target, *operands = words
            values = [int(o, 0) if o[0].isdigit() else registers[o] for o in operands]
            registers[target] = RUN[name](*values) & MASK
    return [registers[f"${i}"] for i in range(4)]


def permute_bytes(low, high, selector):
    both = [(source >> (8 * i)) & 0xFF for source in (low, high) for i in range(4)]
    out = torch.zeros_like(low)
    for i in range(4):
        choice = (selector >> (4 * i)) & 0xF
        byte = both[choice & 7]
        if choice & 8:
            byte = (byte >> 7) * 0xFF
        out |= byte << (8 * i)
    return out


def as_bf16(half):
    return half.to(torch.int32).to(torch.int16).view(torch.bfloat16)


def multiply_add(a, b, c):
    out = torch.zeros_like(a)
    for shift in (0, 16):
        x, y, z = (as_bf16((torch.as_tensor(t) >> shift) & 0xFFFF).double() for t in (a, b, c))
        half = (x * y + z).to(torch.bfloat16).view(torch.int16).long() & 0xFFFF
        out |= half << shift
    return out


RUN = {
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: a + b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b,
    "mov.b32": torch.tensor,
    "prmt.b32": permute_bytes,
    "fma.rn.bf16x2": multiply_add,
}
