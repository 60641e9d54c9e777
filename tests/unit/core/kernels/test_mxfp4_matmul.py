"""The products' twins against a dense formula in float64, and their checks."""

import pytest
import torch

from nexus_cli.core.kernels.mxfp4_matmul import matmul_rows, matmul_rows_transposed
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4


def make(counts, outputs=10, inputs=64):
    torch.manual_seed(0)
    size = (len(counts), outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8)
    scales = torch.randint(118, 135, size, dtype=torch.uint8)
    return blocks, scales, torch.tensor(counts).cumsum(0).int()


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 4], [1, 0, 0], [0, 0, 0]])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_row_meets_its_expert(counts, gathered, transposed):
    blocks, scales, offsets = make(counts)
    rows = sum(counts)
    weight = dequantize_mxfp4(blocks, scales, torch.float64)
    weight = weight.transpose(1, 2) if transposed else weight
    index = torch.randint(0, 6, (rows,)).int() if gathered else None
    x = torch.randn(6 if gathered else rows, weight.shape[2], dtype=torch.float64)
    run = matmul_rows_transposed if transposed else matmul_rows
    expert = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    source = x if index is None else x[index.long()]
    expected = torch.einsum("rd,rcd->rc", source, weight[expert])
    torch.testing.assert_close(run(x, blocks, scales, offsets, index), expected)


def test_the_second_is_the_gradient_of_the_first():
    blocks, scales, offsets = make([2, 3])
    weight = dequantize_mxfp4(blocks, scales, torch.float64)
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    y = torch.cat((x[:2] @ weight[0].T, x[2:] @ weight[1].T))
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(
        matmul_rows_transposed(grad, blocks, scales, offsets, None), expected
    )


def test_what_does_not_fit_is_refused():
    blocks, scales, offsets = make([2, 3])
    x = torch.randn(5, 64)
    for arguments in (
        (x[:, :32], blocks, scales, offsets, None),
        (x, blocks.int(), scales, offsets, None),
        (x, blocks, scales[:, :3], offsets, None),
        (x, blocks, scales, offsets.long(), None),
        (x, blocks, scales, offsets[:1], None),
        (x, blocks, scales, offsets, torch.arange(5)),
        (torch.randn(64, 5).T, blocks, scales, offsets, None),
    ):
        with pytest.raises(ValueError, match=r"."):
            matmul_rows(*arguments)


def test_tiles_are_chosen_by_rows_an_expert():
    pytest.importorskip("triton")
    from nexus_cli.core.kernels.triton.mxfp4_matmul import choose_tiles

    for transposed in (False, True):
        few, many = (choose_tiles(r, transposed=transposed) for r in (8.0, 1e6))
        assert few.rows <= 64
        assert many.rows >= 128
