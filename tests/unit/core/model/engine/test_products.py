"""Every way to multiply with packed experts that runs on a CPU, against decoded weights."""

import pytest
import torch

from nexus_cli.core.kernels.mxfp4_decode import order_scales
from nexus_cli.core.kernels.routing import sort_by_expert
from nexus_cli.core.model.gpt_oss.engine.policy import (
    CROSSOVER_ROWS,
    DECODED_ROWS,
    describe,
    prefers_decoded,
    prefers_fused,
)
from nexus_cli.core.model.gpt_oss.engine.products import (
    Bf16Products,
    DequantProducts,
    FusedProducts,
    PackedWeights,
    TorchProducts,
    Workspace,
)
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4

E, H, I, T, K = 6, 64, 96, 20, 2  # noqa: E741

MAKERS = {
    "torch": TorchProducts,
    "fused": FusedProducts,
    "dequant": DequantProducts,
    "dequant, one expert at a time": lambda weights: DequantProducts(weights, Workspace(1)),
    "dequant, four at a time": lambda weights: DequantProducts(weights, Workspace(4)),
    "bf16": Bf16Products,
}


@pytest.fixture(params=["checkpoint's order", "kernels' order"])
def weights(request):
    torch.manual_seed(0)

    def packed(rows, columns):
        blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (E, rows, columns // 32), dtype=torch.uint8)
        return blocks, order_scales(scales) if request.param == "kernels' order" else scales

    gate_up, down = packed(2 * I, H), packed(H, I)
    return PackedWeights(*gate_up, torch.zeros(E, 2 * I), *down, torch.zeros(E, H), 7.0)


@pytest.mark.parametrize("experts", [None, torch.full((T, K), 5)], ids=["spread", "all on one"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_all_products_are_those_of_the_decoded_weights(weights, make, experts):
    torch.manual_seed(1)
    if experts is None:
        experts = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])  # one is empty
    routing, products = sort_by_expert(experts, E), make(weights)
    gate_up = dequantize_mxfp4(*weights.gate_up)[routing.expert_R]
    down = dequantize_mxfp4(*weights.down)[routing.expert_R]
    token = routing.token_R.long()

    def rows(count, width):
        return torch.randn(count, width).bfloat16()

    cases = [
        (products.gate_up, rows(T, H), gate_up, token),
        (products.down, rows(T * K, I), down, slice(None)),
        (products.grad_down, rows(T, H), down.transpose(1, 2), token),
        (products.grad_gate_up, rows(T * K, 2 * I), gate_up.transpose(1, 2), slice(None)),
    ]
    for product, x, weight, source in cases:
        expected = torch.einsum("rnk,rk->rn", weight.double(), x[source].double())
        ours = product(x, routing)
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - expected).norm() < 4e-3 * expected.norm()


def test_a_workspace_is_one_buffer_for_all_layers(weights):
    workspace = Workspace()
    first = workspace.take(weights.gate_up_blocks)
    second = workspace.take(weights.down_blocks)
    assert first.shape == (E, 2 * I, H)
    assert second.shape == (E, H, I)
    assert first.data_ptr() == second.data_ptr()


def test_the_policy_goes_by_rows_an_expert():
    assert prefers_fused(32 * (CROSSOVER_ROWS - 1), 32)
    assert not prefers_fused(32 * CROSSOVER_ROWS, 32)
    assert prefers_decoded(32 * DECODED_ROWS, 32)
    assert not prefers_decoded(32 * (DECODED_ROWS - 1), 32)
    assert "fused (128 rows an expert" in describe("auto", 1024, 4, 32)
    assert "dequant (2,048 rows an expert" in describe("auto", 16_384, 4, 32)
    assert describe("torch", 1024, 4, 32) == "experts: torch, as asked (128 rows an expert)"
