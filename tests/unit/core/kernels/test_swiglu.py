"""Clamped SwiGLU against that of the model's file and against autograd."""

import pytest
import torch

from nexus_cli.core.kernels.swiglu import (
    swiglu,
    swiglu_backward,
    swiglu_rows,
    swiglu_rows_backward,
)
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import clamped_swiglu

R, I, E, LIMIT = 11, 24, 5, 2.0  # noqa: E741


def routed():
    gate_up_RI, bias_EI = 2 * torch.randn(R, 2 * I).double(), torch.randn(E, 2 * I).double()
    expert_R = torch.randint(E, (R,)).sort().values.int()
    gate_up_RI[0], bias_EI[expert_R[0]] = LIMIT, 0  # on the edge of both clamps
    gate_up_RI[0, 1::4] = -LIMIT
    return gate_up_RI, bias_EI, expert_R


def expected_rows(gate_up_RI, bias_EI, expert_R):
    pairs = gate_up_RI + bias_EI[expert_R.long()]
    return clamped_swiglu(pairs[:, ::2], pairs[:, 1::2], LIMIT)


def test_rows_take_the_bias_of_their_expert():
    tensors = routed()
    torch.testing.assert_close(swiglu_rows(*tensors, LIMIT), expected_rows(*tensors))


@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_of_rows_is_that_of_autograd(in_place):
    gate_up_RI, bias_EI, expert_R = routed()
    grad_RI, score_R = torch.randn(R, I).double(), torch.rand(R).double().requires_grad_()
    gate_up_RI.requires_grad_()
    scored_RI = score_R[:, None] * expected_rows(gate_up_RI, bias_EI, expert_R)
    expected_RI, expected_R = torch.autograd.grad(scored_RI, (gate_up_RI, score_R), grad_RI)
    gate_up_RI, score_R = gate_up_RI.detach(), score_R.detach()
    out = gate_up_RI if in_place else None
    ours_RI, dot_R = swiglu_rows_backward(
        grad_RI, gate_up_RI, bias_EI, expert_R, score_R, LIMIT, out=out
    )
    assert (ours_RI is gate_up_RI) == in_place
    torch.testing.assert_close(ours_RI, expected_RI)
    torch.testing.assert_close(dot_R, expected_R)


def test_the_dense_form_and_its_gradients_are_those_of_autograd():
    halves = 2 * torch.randn(R, 2 * I).double()
    gate_TI, up_TI = halves[:, :I].requires_grad_(), halves[:, I:].requires_grad_()
    biases = torch.randn(I).double(), torch.randn(I).double()
    scale, grad_TI = torch.tensor([0.3]).double().requires_grad_(), torch.randn(R, I).double()
    act_TI = clamped_swiglu(gate_TI + biases[0], up_TI + biases[1], LIMIT)
    inputs = gate_TI, up_TI, scale
    grads = torch.autograd.grad(scale * act_TI, inputs, grad_TI)
    gate_TI, up_TI, scale = (tensor.detach() for tensor in inputs)
    torch.testing.assert_close(swiglu(gate_TI, up_TI, *biases, LIMIT), act_TI.detach())
    ours = swiglu_backward(grad_TI, gate_TI, up_TI, *biases, scale, LIMIT)
    torch.testing.assert_close(ours[0], grads[0])
    torch.testing.assert_close(ours[1], grads[1])
    torch.testing.assert_close(ours[2], (scale * act_TI).detach())
    torch.testing.assert_close(ours[3].sum()[None], grads[2])


def test_bfloat16_is_rounded_once():
    gate_up_RI, bias_EI, expert_R = (t.bfloat16() if t.is_floating_point() else t for t in routed())
    exact_RI = swiglu_rows(gate_up_RI.double(), bias_EI.double(), expert_R, LIMIT)
    ours_RI = swiglu_rows(gate_up_RI, bias_EI, expert_R, LIMIT)
    torch.testing.assert_close(ours_RI.double(), exact_RI, rtol=2**-8, atol=1e-6)


def test_what_does_not_fit_is_refused():
    gate_up_RI, bias_EI, expert_R = routed()
    with pytest.raises(ValueError, match="do not fit"):
        swiglu_rows(gate_up_RI, bias_EI[:, :-2], expert_R, LIMIT)
    with pytest.raises(ValueError, match="scores"):
        swiglu_rows_backward(gate_up_RI[:, :I], gate_up_RI, bias_EI, expert_R, torch.ones(1), LIMIT)
    with pytest.raises(ValueError, match="output"):
        swiglu_rows_backward(
            gate_up_RI[:, :I], gate_up_RI, bias_EI, expert_R, torch.ones(R), LIMIT, bias_EI
        )
    half = gate_up_RI[:, :I]
    with pytest.raises(ValueError, match="biases"):
        swiglu(half, half, torch.ones(I), torch.ones(I + 1), LIMIT)
    with pytest.raises(ValueError, match="scale"):
        swiglu_backward(half, half, half, torch.ones(I), torch.ones(I), torch.ones(2), LIMIT)
    with pytest.raises(ValueError, match="differ"):
        swiglu(half, half.float(), torch.ones(I), torch.ones(I), LIMIT)
