"""Rotary embedding in place against that of GPT-OSS, and its transpose."""

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

from nexus_cli.core.kernels.rotary import rotate_

T, Q, KV, DIM = 9, 6, 2, 16
ROTATED, WIDTH = (Q + KV) * DIM, (Q + 2 * KV) * DIM
HEADS = {"num_heads": Q + KV, "head_dim": DIM}


def tables(dtype=torch.float64, factor=1.3):
    angle = torch.randn(T, DIM // 2, dtype=dtype)
    return factor * angle.cos(), factor * angle.sin()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_q_and_k_rotate_as_in_gpt_oss_and_v_stays(dtype):
    # Rows that are strided, as in a wider buffer.
    qkv_TD = torch.randn(T, WIDTH + 8, dtype=dtype)[:, :WIDTH]
    cos_TR, sin_TR = tables(dtype)
    heads = qkv_TD.clone().view(1, T, -1, DIM).transpose(1, 2)
    q, k = apply_rotary_pos_emb(heads[:, :Q], heads[:, Q : Q + KV], cos_TR[None], sin_TR[None])
    expected = torch.cat((q, k, heads[:, Q + KV :]), dim=1).transpose(1, 2).reshape(T, WIDTH)
    rotate_(qkv_TD, cos_TR, sin_TR, **HEADS)
    torch.testing.assert_close(qkv_TD, expected)


def test_bfloat16_is_rounded_once():
    qkv_TD, (cos_TR, sin_TR) = torch.randn(T, WIDTH).bfloat16(), tables(torch.float32)
    exact_TD = qkv_TD.float()
    rotate_(exact_TD, cos_TR, sin_TR, **HEADS)
    rotate_(qkv_TD, cos_TR, sin_TR, **HEADS)
    assert torch.equal(qkv_TD, exact_TD.bfloat16())


def test_the_inverse_is_the_transpose_factor_included():
    x_TD, y_TD, tables_ = torch.randn(T, WIDTH).double(), torch.randn(T, WIDTH).double(), tables()
    forward_TD, back_TD = x_TD.clone(), y_TD.clone()
    rotate_(forward_TD, *tables_, **HEADS)
    rotate_(back_TD, *tables_, **HEADS, inverse=True)
    torch.testing.assert_close((forward_TD * y_TD).sum(1), (x_TD * back_TD).sum(1))


def test_what_does_not_fit_is_refused():
    cos_TR, sin_TR = tables()
    with pytest.raises(ValueError, match="columns"):
        rotate_(torch.zeros(T, ROTATED - 1), cos_TR, sin_TR, **HEADS)
    with pytest.raises(ValueError, match="cosine"):
        rotate_(torch.zeros(T + 1, WIDTH), cos_TR, sin_TR, **HEADS)
