"""The router's choice against PyTorch's, and its gradient against autograd."""

import pytest
import torch

from nexus_cli.core.kernels.router import top_k_softmax, top_k_softmax_backward

SHAPES = [(5, 1), (32, 4), (128, 4), (256, 8), (8, 8)]


@pytest.mark.parametrize(("experts", "k"), SHAPES)
def test_the_best_are_those_of_topk(experts, k):
    logits_TE = torch.randn(9, experts).double()
    best_TK, experts_TK = logits_TE.topk(k, dim=-1)
    scores_TK, ours_TK = top_k_softmax(logits_TE, k)
    assert ours_TK.dtype == torch.int32
    assert torch.equal(ours_TK.long(), experts_TK)
    torch.testing.assert_close(scores_TK, best_TK.softmax(-1))


def test_of_equals_the_first_is_taken():
    logits_TE = torch.tensor([[0.0, 2, -0.0, 2, 0], [1, 1, 1, 1, 1]]).bfloat16()
    scores_TK, experts_TK = top_k_softmax(logits_TE, 4)
    assert experts_TK.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert scores_TK.dtype == torch.bfloat16
    assert torch.equal(scores_TK[1], torch.full((4,), 0.25).bfloat16())


@pytest.mark.parametrize(("experts", "k"), SHAPES)
def test_the_gradient_is_that_of_autograd(experts, k):
    logits_TE = torch.randn(9, experts).double().requires_grad_()
    grad_TK = torch.randn(9, k).double()
    scores_TK = logits_TE.topk(k, dim=-1).values.softmax(-1)
    (expected_TE,) = torch.autograd.grad(scores_TK, logits_TE, grad_TK)
    scores_TK, experts_TK = top_k_softmax(logits_TE.detach(), k)
    ours_TE = top_k_softmax_backward(grad_TK, scores_TK, experts_TK, experts)
    torch.testing.assert_close(ours_TE, expected_TE)


def test_what_does_not_fit_is_refused():
    for experts, k in ((257, 4), (32, 9), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match="top"):
            top_k_softmax(torch.zeros(2, experts), k)
    scores_TK, experts_TK = top_k_softmax(torch.zeros(2, 8), 4)
    with pytest.raises(ValueError, match="differ in shape"):
        top_k_softmax_backward(scores_TK[:1], scores_TK, experts_TK, 8)
    with pytest.raises(ValueError, match="257"):
        top_k_softmax_backward(scores_TK, scores_TK, experts_TK, 257)
