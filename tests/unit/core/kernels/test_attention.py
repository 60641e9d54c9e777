"""The dense twins against autograd of another formula, and against transformers' own attention."""

import types

import pytest
import torch

from nexus_cli.core.kernels.attention import (
    attention_starts,
    last_query,
    sink_attention,
    sink_attention_backward,
)

CASES = [  # S, Hq, Hkv, D, window, documents
    (1, 2, 1, 16, None, 1),
    (7, 2, 2, 4, 3, 2),
    (37, 8, 1, 16, None, 3),
    (37, 4, 2, 8, 1, 1),
    (100, 4, 2, 16, 16, 4),
    (40, 2, 1, 16, 128, 2),
]


def packed(batch, seq, documents, seed=0):
    """Position ids of rows cut at random into so many documents."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(seq).repeat(batch, 1)
    for row in ids:
        cuts = torch.randperm(seq, generator=generator)[: documents - 1].sort().values.tolist()
        for start in cuts:
            row[start:] = torch.arange(seq - start)
    return ids


def dense(qkv, sinks, positions, window, heads, kv_heads, head_dim, scale):
    """Attention as a softmax with a column more, the mask from documents and distances."""
    batch, seq, _ = qkv.shape
    q, k, v = (
        qkv.view(batch, seq, -1, head_dim).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    )
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    document = (positions == 0).cumsum(-1)
    distance = torch.arange(seq)[:, None] - torch.arange(seq)
    seen = (document[:, :, None] == document[:, None]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    logits = (q @ k.mT * scale).masked_fill(~seen[:, None], float("-inf"))
    column = sinks.view(1, heads, 1, 1).expand(batch, heads, seq, 1)
    logits = torch.cat((logits, column), dim=-1)
    out = logits.softmax(-1)[..., :-1] @ v
    return out.transpose(1, 2).flatten(2), logits.logsumexp(-1)


def draw(seq, heads, kv_heads, head_dim, batch=2):
    torch.manual_seed(seq + heads)
    qkv = torch.randn(batch, seq, (heads + 2 * kv_heads) * head_dim, dtype=torch.float64)
    settings = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    return qkv, torch.randn(heads, dtype=torch.float64), settings | {"scale": head_dim**-0.5}


@pytest.mark.parametrize(("seq", "heads", "kv_heads", "head_dim", "window", "documents"), CASES)
def test_output_and_gradient(seq, heads, kv_heads, head_dim, window, documents):
    qkv, sinks, settings = draw(seq, heads, kv_heads, head_dim)
    positions = packed(2, seq, documents)
    start = attention_starts(positions, window)
    out, lse = sink_attention(qkv, sinks, start, window=window, **settings)
    qkv.requires_grad_()
    expected, expected_lse = dense(qkv, sinks, positions, window, *settings.values())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)

    grad_out = torch.randn_like(out)
    last = last_query(start)
    got = sink_attention_backward(grad_out, qkv.detach(), out, lse, start, last, **settings)
    torch.testing.assert_close(got, torch.autograd.grad(expected, qkv, grad_out)[0])


@pytest.mark.parametrize(("seq", "heads", "kv_heads", "head_dim", "window", "documents"), CASES)
def test_starts_and_last_queries_are_the_mask(seq, heads, kv_heads, head_dim, window, documents):
    del heads, kv_heads, head_dim
    positions = packed(3, seq, documents, seed=1)
    start = attention_starts(positions, window)
    last = last_query(start)
    assert start.dtype == last.dtype == torch.int32
    document = (positions == 0).cumsum(-1)
    for row in range(3):
        for s in range(seq):
            seen = [
                j
                for j in range(s + 1)
                if document[row, j] == document[row, s] and (window is None or s - j < window)
            ]
            assert start[row, s] == min(seen)
        for j in range(seq):
            assert last[row, j] == max(s for s in range(seq) if start[row, s] <= j)
    assert (start.diff() >= 0).all()
    assert (last.diff() >= 0).all()


@pytest.mark.parametrize(("spread", "sink"), [(50.0, 0.0), (1.0, -1e4), (1.0, 50.0), (50.0, 50.0)])
def test_extreme_logits_stay_finite(spread, sink):
    qkv, sinks, settings = draw(20, 4, 2, 16)
    qkv[..., : 4 * 16] *= spread
    start = attention_starts(packed(2, 20, 2), 8)
    for dtype in (torch.float32, torch.bfloat16):
        x = qkv.to(dtype)
        out, lse = sink_attention(x, sinks + sink, start, **settings)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        grad = sink_attention_backward(
            torch.ones_like(out), x, out, lse, start, last_query(start), **settings
        )
        assert grad.dtype == dtype
        assert all(tensor.isfinite().all() for tensor in (out, lse, grad))


@pytest.mark.parametrize("window", [None, 5])
def test_agrees_with_transformers(window):
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    seq, heads, kv_heads, head_dim = 12, 8, 2, 16
    qkv, sinks, settings = draw(seq, heads, kv_heads, head_dim)
    qkv, sinks = qkv.float(), sinks.float()
    start = attention_starts(torch.arange(seq).expand(2, seq), window)
    out, _ = sink_attention(qkv, sinks, start, **settings)

    q, k, v = qkv.view(2, seq, -1, head_dim).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    index = torch.arange(seq)
    hidden = (index > index[:, None]) | (index < start[..., None])
    mask = torch.zeros(2, 1, seq, seq).masked_fill(hidden[:, None], torch.finfo(torch.float32).min)
    module = types.SimpleNamespace(
        sinks=sinks, num_key_value_groups=heads // kv_heads, training=False
    )
    expected, _ = eager_attention_forward(module, q, k, v, mask, scaling=settings["scale"])
    torch.testing.assert_close(out, expected.flatten(2), atol=2e-6, rtol=1e-5)


def test_refuses_what_does_not_fit():
    qkv, sinks, settings = draw(6, 4, 2, 16)
    start = attention_starts(torch.arange(6).expand(2, 6), None)
    with pytest.raises(ValueError, match="window is 0"):
        attention_starts(torch.arange(6)[None], 0)
    with pytest.raises(ValueError, match="must be"):
        sink_attention(qkv[..., :-1], sinks, start, **settings)
    with pytest.raises(ValueError, match="contiguous"):
        sink_attention(qkv.transpose(0, 1).contiguous().transpose(0, 1), sinks, start, **settings)
    with pytest.raises(ValueError, match="4 query heads"):
        sink_attention(qkv, sinks[:3], start, **settings)
    with pytest.raises(ValueError, match="start is"):
        sink_attention(qkv, sinks, start.long(), **settings)
    with pytest.raises(ValueError, match="evenly"):
        sink_attention(qkv, sinks, start, **(settings | {"num_kv_heads": 3}))
    with pytest.raises(ValueError, match="positive"):
        sink_attention(qkv, sinks, start, **(settings | {"scale": 0.0}))
    with pytest.raises(ValueError, match="not on meta"):
        sink_attention(qkv.to("meta"), sinks.to("meta"), start.to("meta"), **settings)
    out, lse = sink_attention(qkv, sinks, start, **settings)
    with pytest.raises(ValueError, match="grad_out is"):
        sink_attention_backward(out[:, 1:], qkv, out, lse, start, last_query(start), **settings)
    with pytest.raises(ValueError, match="last is"):
        sink_attention_backward(out, qkv, out, lse, start, start.long(), **settings)
