"""The routed block as an operator: against plain autograd in float64, and under torch.compile."""

import pytest
import torch
from torch.autograd import gradcheck

from nexus_cli.core.model.gpt_oss.engine.operators import routed_experts, routed_experts_parts
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import FrozenExperts

E, H, I, T, K = 5, 32, 64, 7, 2  # noqa: E741
LIMIT = 7.0


@pytest.fixture
def weights():
    torch.manual_seed(0)

    def packed(rows, columns):
        blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 125, (E, rows, columns // 32), dtype=torch.uint8)
        return blocks, scales

    return (
        packed(2 * I, H),
        torch.randn(E, 2 * I, dtype=torch.float64),
        packed(H, I),
        torch.randn(E, H, dtype=torch.float64),
    )


def inputs(experts=None):
    torch.manual_seed(1)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    if experts is None:
        experts = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return x, scores, experts


@pytest.mark.parametrize(
    "experts",
    [None, torch.full((T, K), 3), torch.tensor([[4, 0]] * T)],
    ids=["spread", "all on one", "three experts empty"],
)
def test_values_and_gradients_equal_the_self_contained_form(weights, experts):
    x, scores, experts = inputs(experts)
    ours = routed_experts(x, scores, experts, *weights, LIMIT, backend="torch")
    theirs = FrozenExperts.apply(x, scores, experts, *weights, LIMIT)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)
    weight = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), (x, scores)),
        torch.autograd.grad((theirs * weight).sum(), (x, scores)),
        rtol=1e-11,
        atol=1e-9,
    )


def test_gradients_pass_gradcheck(weights):
    x, scores, experts = inputs()
    assert gradcheck(
        lambda x, s: routed_experts(x, s, experts, *weights, LIMIT, backend="torch"),
        (x, scores),
        atol=1e-5,
    )


def test_the_operator_passes_the_checks_of_torch(weights):
    x, scores, experts = inputs()
    (gate_up, gate_up_bias, down, down_bias) = weights
    arguments = (x, scores, experts, *gate_up, gate_up_bias, *down, down_bias, LIMIT, "torch")
    torch.library.opcheck(
        routed_experts_parts,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_a_graph_is_not_broken_by_the_operator(weights):
    x, scores, experts = inputs()

    def block(x, scores):
        return (2 * routed_experts(x, scores, experts, *weights, LIMIT, backend="torch")).tanh()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = block(x, scores)
    torch.testing.assert_close(compiled(x, scores), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, scores).sum(), (x, scores)),
        torch.autograd.grad(expected.sum(), (x, scores)),
    )


def test_another_backend_needs_a_cuda_device(weights):
    x, scores, experts = inputs()
    with pytest.raises(ValueError, match="fused needs a CUDA device, not cpu"):
        routed_experts(x, scores, experts, *weights, LIMIT, backend="fused")
    with pytest.raises(ValueError, match="one of auto, torch"):
        routed_experts(x, scores, experts, *weights, LIMIT, backend="fast")
