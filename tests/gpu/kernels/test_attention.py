"""The attention kernels against the float64 twin, and against the error of bfloat16 itself."""

import pytest
import torch

from nexus_cli.core.kernels.attention import (
    attention_starts,
    last_query,
    sink_attention,
    sink_attention_backward,
    sink_attention_backward_torch,
    sink_attention_torch,
)

pytestmark = pytest.mark.gpu

GPT_OSS = (64, 8, 64)
CASES = [  # B, S, (Hq, Hkv, D), window, documents
    (2, 1, GPT_OSS, None, 1),
    (2, 37, GPT_OSS, 128, 2),
    (1, 100, GPT_OSS, None, 3),
    (2, 257, GPT_OSS, 128, 1),
    (1, 1024, GPT_OSS, 128, 5),
    (1, 1024, GPT_OSS, None, 5),
    (4, 1024, GPT_OSS, None, 1),
    (1, 1000, (8, 1, 64), 1, 2),
    (1, 700, (4, 4, 32), 16, 2),
    (2, 300, (12, 2, 16), None, 2),
    (1, 300, (8, 4, 128), None, 2),
    (1, 300, (8, 4, 128), 600, 2),
]


def draw(batch, seq, heads, window, documents, dtype=torch.bfloat16):
    num_heads, num_kv_heads, head_dim = heads
    torch.manual_seed(seq)
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(batch, seq, columns, device="cuda").to(dtype)
    grad = torch.randn(batch, seq, num_heads * head_dim, device="cuda").to(dtype)
    sinks = torch.randn(num_heads, device="cuda").bfloat16()
    positions = torch.arange(seq, device="cuda").repeat(batch, 1)
    for row in positions:
        for start in torch.randint(0, seq, (documents - 1,)).sort().values.tolist():
            row[start:] = torch.arange(seq - start, device="cuda")
    start = attention_starts(positions, window)
    settings = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return qkv, grad, sinks, start, settings | {"scale": head_dim**-0.5}


def ours(qkv, grad, sinks, start, settings, window):
    out, lse = sink_attention(qkv, sinks, start, window=window, **settings)
    last = last_query(start)
    back = sink_attention_backward(grad, qkv, out, lse, start, last, window=window, **settings)
    return out, lse, back


def twin(qkv, grad, sinks, start, settings, dtype):
    out, lse = sink_attention_torch(qkv.to(dtype), sinks, start, **settings)
    back = sink_attention_backward_torch(grad.to(dtype), qkv.to(dtype), out, lse, start, **settings)
    return out, lse, back


def bfloat16_path(qkv, grad, sinks, start, settings):
    """The usual way: bfloat16 products, softmax over a column more, autograd."""
    heads, kv_heads, head_dim, scale = settings.values()
    leaf = qkv.detach().requires_grad_()
    q, k, v = (
        leaf.unflatten(-1, (-1, head_dim)).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    )
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    index = torch.arange(qkv.shape[1], device="cuda")
    seen = (index >= start[..., None]) & (index <= index[:, None])
    logits = (q @ k.mT * scale).masked_fill(~seen[:, None], float("-inf"))
    column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    out = torch.cat((logits, column), -1).softmax(-1)[..., :-1] @ v
    out = out.transpose(1, 2).flatten(2)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("batch", "seq", "heads", "window", "documents"), CASES)
def test_as_exact_as_bfloat16_allows(batch, seq, heads, window, documents):
    qkv, grad, sinks, start, settings = draw(batch, seq, heads, window, documents)
    out, lse, back = ours(qkv, grad, sinks, start, settings, window)
    exact_out, exact_lse, exact_back = twin(qkv, grad, sinks, start, settings, torch.float64)
    usual_out, usual_back = bfloat16_path(qkv, grad, sinks, start, settings)
    assert error(out, exact_out) <= 1.2 * error(usual_out, exact_out) + 1e-4
    assert (lse - exact_lse).abs().max() < 2e-4
    columns = (heads[0] * heads[2], heads[1] * heads[2], heads[1] * heads[2])
    parts = (part.split(columns, dim=-1) for part in (back, usual_back, exact_back))
    for got, usual, exact in zip(*parts, strict=True):
        # With one key a row the queries' gradient is small: the difference of two equal sums.
        if exact.norm() > 1e-3 * exact_back.norm():
            assert error(got, exact) <= 1.2 * error(usual, exact) + 1e-4


@pytest.mark.parametrize("window", [None, 50])
def test_float32(window):
    heads = (8, 2, 64)
    qkv, grad, sinks, start, settings = draw(2, 150, heads, window, 2, torch.float32)
    got = ours(qkv, grad, sinks, start, settings, window)
    exact = twin(qkv, grad, sinks, start, settings, torch.float64)
    for one, other in zip(got, exact, strict=True):
        assert error(one, other) < 3e-6


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("window", [None, 128])
def test_two_runs_are_equal_and_everything_is_written(batch, window):
    arguments = draw(batch, 777, GPT_OSS, window, 3)
    first = ours(*arguments, window)
    # The allocator hands out what the next lines free: whatever stays unwritten is not a number.
    for tensor in first:
        poison = [torch.full_like(tensor, float("nan")) for _ in range(3)]
        del poison
    second = ours(*arguments, window)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize(("spread", "sink"), [(50.0, 0.0), (1.0, -1e4), (1.0, 50.0)])
def test_extreme_logits_stay_finite(spread, sink):
    qkv, grad, sinks, start, settings = draw(1, 200, GPT_OSS, 128, 2)
    qkv[..., : 64 * 64] *= spread
    for tensor in ours(qkv, grad, sinks + sink, start, settings, 128):
        assert tensor.isfinite().all()


def test_the_window_argument_only_chooses_tiles():
    arguments = draw(1, 600, GPT_OSS, 128, 2)
    for one, other in zip(ours(*arguments, 128), ours(*arguments, None), strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_captured_in_a_graph():
    qkv, grad, sinks, start, settings = draw(1, 512, GPT_OSS, 128, 2)
    expected = ours(qkv, grad, sinks, start, settings, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ours(qkv, grad, sinks, start, settings, 128)
    graph.replay()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
