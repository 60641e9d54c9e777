"""Gather and combine against a loop over tokens, and against each other."""

import itertools

import pytest
import torch

from nexus_cli.core.kernels.routing import sort_by_expert
from nexus_cli.core.kernels.rows import combine_rows, spread_rows

T, K, E, H = 7, 3, 5, 12


def routed():
    experts_TK = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    return experts_TK, sort_by_expert(experts_TK, E)


def doubles(*shape):
    return torch.randn(*shape).double()


def test_every_row_is_its_tokens():
    experts_TK, routing = routed()
    x_TH = doubles(T, H)
    x_RH = spread_rows(x_TH, routing)
    for token, place in itertools.product(range(T), range(K)):
        row = routing.row_TK[token, place]
        assert torch.equal(x_RH[row], x_TH[token])
        assert routing.expert_R[row] == experts_TK[token, place]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shared", ["", "shared", "shared bias", "shared scale", "all"])
def test_a_token_is_the_sum_of_its_parts(scored, biased, residual, shared):
    experts_TK, routing = routed()
    rows_RH, scores_TK, bias_EH = doubles(T * K, H), doubles(T, K), doubles(E, H)
    parts, out_TH = {}, torch.zeros(T, H).double()
    for token, place in itertools.product(range(T), range(K)):
        row = rows_RH[routing.row_TK[token, place]]
        if biased:
            row = row + bias_EH[experts_TK[token, place]]
        out_TH[token] += row * scores_TK[token, place] if scored else row
    if scored:
        parts["scores_TK"] = scores_TK
    if biased:
        parts |= {"experts_TK": experts_TK, "bias_EH": bias_EH}
    if residual:
        parts["residual_TH"] = doubles(T, H)
        out_TH += parts["residual_TH"]
    if shared:
        term = parts["shared_TH"] = doubles(T, H)
        if shared in ("shared bias", "all"):
            parts["shared_bias_H"] = doubles(H)
            term = term + parts["shared_bias_H"]
        if shared in ("shared scale", "all"):
            parts["shared_scale"] = doubles(1)
            term = term * parts["shared_scale"]
        out_TH += term
    torch.testing.assert_close(combine_rows(rows_RH, routing, **parts), out_TH)


def test_combine_is_the_gradient_of_gather():
    _, routing = routed()
    x_TH, grad_RH = doubles(T, H).requires_grad_(), doubles(T * K, H)
    x_RH = spread_rows(x_TH, routing)
    (expected_TH,) = torch.autograd.grad(x_RH, x_TH, grad_RH)
    torch.testing.assert_close(combine_rows(grad_RH, routing), expected_TH)


def test_parts_without_their_partners_are_refused():
    experts_TK, routing = routed()
    rows_RH = doubles(T * K, H)
    with pytest.raises(ValueError, match="come together"):
        combine_rows(rows_RH, routing, experts_TK=experts_TK)
    with pytest.raises(ValueError, match="without a shared output"):
        combine_rows(rows_RH, routing, shared_scale=torch.ones(1))
    with pytest.raises(ValueError, match="is due"):
        combine_rows(rows_RH, routing, residual_TH=rows_RH)
    with pytest.raises(ValueError, match="no kernel"):
        spread_rows(rows_RH.to("meta"), routing)
