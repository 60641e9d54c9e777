"""The MXFP4 kernels against their float64 twins.

Scales lie in either order of features and blocks, and are small or of any size.
"""

import pytest
import torch

from nexus_cli.core.kernels import mxfp4_matmul
from nexus_cli.core.kernels.mxfp4_decode import decode_into_torch, order_scales
from nexus_cli.core.kernels.triton import mxfp4_decode as decode_kernels
from nexus_cli.core.kernels.triton import mxfp4_matmul as kernels
from nexus_cli.core.kernels.triton.mxfp4_matmul import Tiles

pytestmark = pytest.mark.gpu

DEVICE, DTYPE = "cuda", torch.bfloat16
SMALL = [([5, 0, 40, 33], 96, 96), ([0, 0, 70], 64, 64), ([1], 80, 160), ([0, 3, 0], 130, 32)]
LARGE = [([130, 0, 700, 1, 64, 65], 5760, 2880), ([0, 257], 2880, 2880), ([31, 33, 0], 2880, 96)]
TABLE = {tiles for table in (kernels.FORWARD, kernels.TRANSPOSED) for _, tiles in table}
TILES = sorted(
    TABLE | {Tiles(32, 64, 64, 4, 2, swapped=True), Tiles(64, 64, 64, 4, 3, swapped=False)}
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """New memory is NaN, so that what a kernel does not write is seen."""
    torch.manual_seed(0)
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        tensor = new_empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def packed(experts, outputs, inputs):
    size = (experts, outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, device=DEVICE)
    return blocks, torch.randint(116, 124, size, dtype=torch.uint8, device=DEVICE)


def test_decoding_is_exact_for_every_byte_and_scale():
    blocks = torch.arange(256, device=DEVICE).to(torch.uint8).view(16, 16)
    blocks = blocks.expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, device=DEVICE).to(torch.uint8)
    scales = scales[None, :, None].expand(1, 256, 16).contiguous()
    out = torch.full((1, 256, 512), float("nan"), dtype=DTYPE, device=DEVICE)
    decode_kernels.decode_into(blocks, scales, out)
    expected = torch.empty_like(out)
    decode_into_torch(blocks, scales, expected)
    assert torch.equal(out, expected)
    assert torch.equal(out.signbit(), expected.signbit())


@pytest.mark.parametrize("order", [order_scales, torch.clone])
def test_decoding_writes_its_experts_only(order):
    blocks, scales = packed(4, 7, 96)
    scales = order(scales)
    out = torch.zeros(4, 7, 96, dtype=DTYPE, device=DEVICE)
    decode_kernels.decode_into(blocks[1:3], scales[1:3], out[1:3])
    expected = torch.zeros_like(out)
    decode_into_torch(blocks[1:3], scales[1:3], expected[1:3])
    assert torch.equal(out, expected)


def test_decoding_past_two_to_the_31():
    blocks, scales = packed(131, 5760, 2880)
    out = torch.empty(131, 5760, 2880, dtype=DTYPE, device=DEVICE)
    decode_kernels.decode_into(blocks, scales, out)
    for expert in (0, 129, 130):
        expected = torch.empty(1, 5760, 2880, dtype=DTYPE, device=DEVICE)
        decode_into_torch(blocks[expert, None], scales[expert, None], expected)
        assert torch.equal(out[expert], expected[0])


@pytest.mark.parametrize(("counts", "outputs", "inputs"), SMALL + LARGE)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("small_scales", [False, True])
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_products(counts, outputs, inputs, gathered, transposed, small_scales, tiles):
    blocks, scales = packed(len(counts), outputs, inputs)
    if small_scales:  # the order and the size of scales, in two of their four pairs
        scales = order_scales(scales)
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    rows = sum(counts)
    tokens = max(1, rows // 2) if gathered else rows
    x = torch.randn(tokens, outputs if transposed else inputs, device=DEVICE).to(DTYPE)
    index = torch.randint(0, tokens, (rows,), device=DEVICE).int() if gathered else None

    def run():
        return kernels.matmul_rows(
            x,
            blocks,
            scales,
            offsets,
            index,
            transposed=transposed,
            small_scales=small_scales,
            tiles=tiles,
        )

    first, second = run(), run()
    assert torch.equal(first, second)
    twin = (
        mxfp4_matmul.matmul_rows_transposed_torch if transposed else mxfp4_matmul.matmul_rows_torch
    )
    exact = twin(x.double(), blocks, scales, offsets, index)
    dense = twin(x, blocks, scales, offsets, index)
    assert error(first, exact) <= 1.2 * error(dense, exact) + 1e-6


def test_no_rows():
    blocks, scales = packed(3, 64, 64)
    offsets = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    x = torch.zeros(0, 64, dtype=DTYPE, device=DEVICE)
    y = kernels.matmul_rows(x, blocks, scales, offsets, None, transposed=False, small_scales=False)
    assert y.shape == (0, 64)


def error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30))
