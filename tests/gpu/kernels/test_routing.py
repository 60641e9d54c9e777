"""The counting sort on a CUDA device against the sort of PyTorch."""

import pytest
import torch

from nexus_cli.core.kernels.routing import sort_by_expert, sort_by_expert_torch

pytestmark = pytest.mark.gpu

VECTORS = ("slot_R", "row_TK", "expert_R", "offsets_E", "token_R")


@pytest.mark.parametrize("num_experts", [4, 5, 32, 128])
@pytest.mark.parametrize("tokens", [0, 1, 33, 1024, 65_536])
def test_the_sort_is_the_stable_one(tokens, num_experts):
    torch.manual_seed(0)
    weights = torch.rand(num_experts).expand(max(tokens, 1), -1)
    experts = torch.multinomial(weights, 4)[:tokens].int().cuda()
    ours, theirs = sort_by_expert(experts, num_experts), sort_by_expert_torch(experts, num_experts)
    for name in VECTORS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_all_rows_on_one_expert():
    experts = torch.full((5000, 4), 31, dtype=torch.int32, device="cuda")
    ours, theirs = sort_by_expert(experts, 32), sort_by_expert_torch(experts, 32)
    for name in VECTORS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
