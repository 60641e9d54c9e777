"""Sorting routed rows by expert; its kernels compiled for GPUs that are not here."""

import pytest
import torch

from nexus_cli.core.kernels.routing import sort_by_expert


@pytest.mark.parametrize(
    "experts",
    [
        torch.tensor([[3, 0], [0, 1], [3, 1]]),
        torch.full((5, 2), 4),
        torch.stack([torch.randperm(6)[:4] for _ in range(50)]),
        torch.zeros((0, 2), dtype=torch.int64),
    ],
    ids=["few", "all on one", "many", "none"],
)
def test_rows_of_an_expert_lie_together_in_the_order_of_the_tokens(experts):
    routing = sort_by_expert(experts, 6)
    assert routing.num_experts == 6
    expected = [
        (expert, token * experts.shape[1] + place)
        for expert in range(6)
        for token, row in enumerate(experts.tolist())
        for place, chosen in enumerate(row)
        if chosen == expert
    ]
    assert list(zip(routing.expert_R.tolist(), routing.slot_R.tolist(), strict=True)) == expected
    assert routing.token_R.tolist() == [slot // experts.shape[1] for _, slot in expected]
    assert routing.offsets_E.tolist() == [int((experts <= e).sum()) for e in range(6)]
    for row, slot in enumerate(routing.slot_R.tolist()):
        assert routing.row_TK.flatten()[slot] == row


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_sort_compiles_without_spilling(compile_kernel, capability):
    from nexus_cli.core.kernels.triton import routing

    i32 = "*i32"
    kernels = [
        (routing.count_kernel, {"experts": i32, "counts": i32, "rows": "i32"}, {}),
        (
            routing.scan_kernel,
            {"counts": i32, "offsets": i32, "blocks": "i32", "num_experts": "i32"},
            {"STEP": 32},
        ),
        (
            routing.place_kernel,
            {
                "experts": i32, "starts": i32, "slots": i32, "rows_of_slots": i32,
                "sorted_experts": i32, "tokens": i32, "rows": "i32",
            },
            {"TOP_K": 4},
        ),
    ]  # fmt: skip
    for kernel, signature, constants in kernels:
        block = {} if kernel is routing.scan_kernel else {"BLOCK": routing.BLOCK}
        done = compile_kernel(
            kernel, signature, {"PADDED": 128, **block, **constants}, capability=capability
        )
        assert done.stack_bytes == 0
