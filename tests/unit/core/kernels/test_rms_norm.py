"""RMS norm against GPT-OSS's own and against autograd."""

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from nexus_cli.core.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward

T, H, EPS = 7, 96, 1e-5


def rows(dtype=torch.float64):
    return torch.randn(T, H, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_gpt_oss(dtype):
    norm = GptOssRMSNorm(H, EPS).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x_TH = rows(dtype)
    normed_TH, rstd_T = rms_norm(x_TH, norm.weight.detach(), EPS)
    assert normed_TH.dtype == dtype
    assert rstd_T.dtype == torch.float32
    torch.testing.assert_close(normed_TH, norm(x_TH).detach())


def test_the_norm_of_a_sum_is_that_of_the_rounded_sum():
    x_TH, y_TH, weight_H = rows(torch.bfloat16), rows(torch.bfloat16), torch.randn(H)
    sum_TH, normed_TH, rstd_T = add_rms_norm(x_TH, y_TH, weight_H, EPS)
    assert torch.equal(sum_TH, x_TH + y_TH)
    for ours, theirs in zip((normed_TH, rstd_T), rms_norm(x_TH + y_TH, weight_H, EPS), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("with_residual", [False, True])
def test_the_gradient_is_that_of_autograd(with_residual):
    x_TH, weight_H, grad_TH = rows().requires_grad_(), torch.randn(H).double(), rows()
    normed_TH, rstd_T = rms_norm(x_TH, weight_H, EPS)
    (expected_TH,) = torch.autograd.grad(normed_TH, x_TH, grad_TH)
    residual_TH = rows() if with_residual else None
    if residual_TH is not None:
        expected_TH = expected_TH + residual_TH
    x_TH, rstd_T = x_TH.detach(), rstd_T.detach()
    dx_TH = rms_norm_backward(grad_TH, x_TH, rstd_T, weight_H, residual_TH)
    torch.testing.assert_close(dx_TH, expected_TH)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="weight"):
        rms_norm(rows(), torch.ones(H + 1), EPS)
    with pytest.raises(ValueError, match="differ"):
        add_rms_norm(rows(), rows(torch.float32), torch.ones(H), EPS)
    with pytest.raises(ValueError, match="no kernel"):
        rms_norm(rows().to("meta"), torch.ones(H, device="meta"), EPS)
