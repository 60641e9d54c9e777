"""Sums over hidden units against their float64 twin."""

import pytest
import torch

from nexus_cli.core.kernels.routing import sort_by_expert_torch
from nexus_cli.core.kernels.triton import unit_sums as kernels
from nexus_cli.core.kernels.unit_sums import add_unit_sums_torch_

pytestmark = pytest.mark.gpu

SIZES = [(1, 4, 64), (70, 8, 96), (40, 32, 192), (16384, 32, 2880), (4096, 128, 2880)]


@pytest.mark.parametrize(("tokens", "experts", "width"), SIZES)
def test_sums_are_those_of_the_twin_in_float64(tokens, experts, width):
    generator = torch.Generator().manual_seed(0)
    skew = torch.linspace(0, 3, experts)  # most rows go to the last experts, some have none
    chosen = (torch.randn(tokens, experts, generator=generator) + skew).topk(4).indices
    offsets = sort_by_expert_torch(chosen, experts).offsets_E.to("cuda")
    hidden = torch.randn(4 * tokens, width, generator=generator).to("cuda", torch.bfloat16)
    weight = torch.rand(4 * tokens, generator=generator).to("cuda")
    weight[::3] = 0
    scale = torch.rand(experts, width, generator=generator).to("cuda")
    found = torch.full((experts, width), 3.0, dtype=torch.float64, device="cuda")
    expected = found.clone()
    kernels.add_unit_sums_(found, hidden, weight, offsets, scale)
    add_unit_sums_torch_(expected, hidden.double(), weight.double(), offsets, scale.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
