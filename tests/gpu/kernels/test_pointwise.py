"""The memory-bound kernels against their float64 twins.

On a GPU in bfloat16. ``TRITON_INTERPRET=1`` runs the same kernels on a CPU in float32, at the
smaller sizes: Triton's interpreter multiplies bfloat16 wrongly.
"""

import itertools
import os

import pytest
import torch

from nexus_cli.core.kernels import rms_norm, rotary, router, rows, swiglu
from nexus_cli.core.kernels.routing import sort_by_expert_torch
from nexus_cli.core.kernels.triton import rms_norm as norm_kernels
from nexus_cli.core.kernels.triton import rotary as rotary_kernels
from nexus_cli.core.kernels.triton import router as router_kernels
from nexus_cli.core.kernels.triton import rows as rows_kernels
from nexus_cli.core.kernels.triton import swiglu as swiglu_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
pytestmark = [] if INTERPRETED else pytest.mark.gpu

SIZES = [(5, 64), (7, 96), (3, 2880)]
SIZES += [] if INTERPRETED else [(1, 2880), (4099, 2880), (513, 5760)]
EPS, LIMIT = 1e-5, 7.0


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """New memory is NaN or -7, so that what a kernel does not write is seen."""
    torch.manual_seed(0)
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def normal(*shape, dtype=None):
    return torch.randn(*shape, device=DEVICE).to(dtype or DTYPE)


def wide(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def check(run, expected):
    """Two runs are bit-equal, and as near the exact result as one rounding allows."""
    first, second = run(), run()
    if isinstance(first, torch.Tensor):
        first, second, expected = (first,), (second,), (expected,)
    for ours, again, exact in zip(first, second, expected, strict=True):
        assert torch.equal(ours, again)
        assert ours.shape == exact.shape
        if not exact.is_floating_point():
            assert ours.dtype == exact.dtype
            assert torch.equal(ours, exact)
            continue
        rounding = (exact.to(ours.dtype).double() - exact).norm()
        error = (ours.double() - exact).norm()
        assert error <= 1.2 * rounding + 2e-6 * exact.norm()


@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_norm(tokens, hidden, weight_dtype):
    x, y, grad, residual = (normal(tokens, hidden) for _ in range(4))
    weight = normal(hidden, dtype=weight_dtype)
    exact = rms_norm.rms_norm_torch(*wide(x, weight), EPS)
    check(lambda: norm_kernels.rms_norm(x, weight, EPS), exact)
    exact_sum = x + y
    exact = rms_norm.rms_norm_torch(*wide(exact_sum, weight), EPS)
    check(lambda: norm_kernels.add_rms_norm(x, y, weight, EPS), (exact_sum.double(), *exact))
    rstd = exact[1].float()
    for more in (None, residual):
        arguments = grad, exact_sum, rstd, weight, more
        exact = rms_norm.rms_norm_backward_torch(*wide(*arguments))
        check(lambda a=arguments: norm_kernels.rms_norm_backward(*a), exact)


@pytest.mark.parametrize(("heads", "dim", "columns"), [(72, 64, 5120), (5, 16, 120), (3, 24, 72)])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tokens", [3] if INTERPRETED else [3, 2049])
def test_rotary(tokens, heads, dim, columns, inverse):
    qkv = normal(tokens, columns + 16)
    cos, sin = (normal(tokens, dim // 2, dtype=torch.float32) for _ in range(2))

    def run():
        rotated = qkv.clone()
        rotary_kernels.rotate_(rotated[:, :columns], cos, sin, heads, dim, inverse)
        return rotated

    exact = qkv.double()
    rotary.rotate_torch_(exact, *wide(cos, sin), num_heads=heads, head_dim=dim, inverse=inverse)
    check(run, exact)


def clamp_edges(gate_up, bias_of_first):
    """The first row exactly on the limits, where the gradient still passes."""
    gate_up[0] = LIMIT
    gate_up[0, 1::4] = -LIMIT
    bias_of_first.zero_()


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("experts", [5, 128])
def test_swiglu_of_rows(tokens, width, experts):
    gate_up, bias = 5 * normal(tokens, 2 * width), normal(experts, 2 * width)
    expert = torch.randint(experts, (tokens,), device=DEVICE).sort().values.int()
    clamp_edges(gate_up, bias[expert[0]])
    grad, score = normal(tokens, width), normal(tokens)
    exact = swiglu.swiglu_rows_torch(*wide(gate_up, bias, expert), LIMIT)
    check(lambda: swiglu_kernels.swiglu_rows(gate_up, bias, expert, LIMIT), exact)
    exact = swiglu.swiglu_rows_backward_torch(*wide(grad, gate_up, bias, expert, score), LIMIT)

    def run(in_place):
        rows_ = gate_up.clone()
        return swiglu_kernels.swiglu_rows_backward(
            grad, rows_, bias, expert, score, LIMIT, rows_ if in_place else None
        )

    check(lambda: run(False), exact)
    check(lambda: run(True), exact)


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_dense_swiglu(tokens, width, strided, scale):
    gate, up = 5 * normal(tokens, 2, width).transpose(0, 1)
    if not strided:
        gate, up = gate.contiguous(), up.contiguous()
    biases = [normal(width, dtype=torch.float32), normal(width)]
    clamp_edges(gate, biases[0])
    grad, factor = normal(tokens, width), torch.tensor([scale], device=DEVICE)
    exact = swiglu.swiglu_torch(*wide(gate, up, *biases), LIMIT)
    check(lambda: swiglu_kernels.swiglu(gate, up, *biases, LIMIT), exact)
    arguments = grad, gate, up, *biases, factor
    exact = swiglu.swiglu_backward_torch(*wide(*arguments), LIMIT)
    check(lambda: swiglu_kernels.swiglu_backward(*arguments, LIMIT), exact)


@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
@pytest.mark.parametrize(("experts", "top_k"), [(5, 1), (32, 3), (128, 4)])
def test_rows(tokens, hidden, experts, top_k):
    experts_TK = torch.rand(tokens, experts, device=DEVICE).topk(top_k).indices.int()
    routing = sort_by_expert_torch(experts_TK, experts)
    x, rows_RH = normal(tokens, hidden), normal(tokens * top_k, hidden)
    check(
        lambda: rows_kernels.spread_rows(x, routing.row_TK),
        rows.spread_rows_torch(x, routing).double(),
    )
    shared = normal(tokens, hidden), normal(hidden, dtype=torch.float32), torch.ones(1) / 3
    shared = tuple(tensor.to(DEVICE) for tensor in shared)
    nothing = None, None, None
    for scores, bias, residual, beside in itertools.product(
        (None, normal(tokens, top_k), normal(tokens, top_k, dtype=torch.float32)),
        ((None, None), (experts_TK, normal(experts, hidden))),
        (None, normal(tokens, hidden)),
        (nothing, shared, (shared[0], None, None)),
    ):
        arguments = rows_RH, routing.row_TK, scores, *bias, residual, *beside
        exact = rows.combine_rows_torch(*wide(*arguments))
        check(lambda a=arguments: rows_kernels.combine_rows(*a), exact)


@pytest.mark.parametrize("tokens", [1, 67] if INTERPRETED else [1, 67, 16_411])
@pytest.mark.parametrize(
    ("experts", "k"), [(5, 1), (7, 3), (32, 4), (128, 4), (200, 5), (256, 8), (8, 8)]
)
def test_top_k(tokens, experts, k):
    logits = (4 * normal(tokens, experts)).round() / 4  # with many ties
    logits[0, ::2], logits[0, 1::2] = -0.0, 0.0
    if tokens > 2:
        logits[1] = float("-inf")
        logits[1, -1] = 1
        logits[2] -= 2.0**120
    exact = router.top_k_softmax_torch(logits.double(), k)
    check(lambda: router_kernels.top_k_softmax(logits, k), exact)
    scores, chosen = exact[0].to(DTYPE), exact[1]
    for dtype in (DTYPE, torch.float32):
        grad = normal(tokens, k, dtype=dtype)
        exact = router.top_k_softmax_backward_torch(*wide(grad, scores, chosen), experts)
        check(
            lambda g=grad: router_kernels.top_k_softmax_backward(g, scores, chosen, experts), exact
        )


def test_nan_is_neither_hidden_nor_followed():
    """It stays NaN in activations, and experts stay in range: nothing reads beyond a tensor."""
    _, experts = router_kernels.top_k_softmax(normal(3, 32).fill_(float("nan")), 4)
    assert experts.sort().values.tolist() == 3 * [[0, 1, 2, 3]]
    gate_up, expert = normal(1, 128), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    gate_up[0, 0] = gate_up[0, 3] = float("nan")
    act = swiglu_kernels.swiglu_rows(gate_up, normal(1, 128), expert, LIMIT)
    assert act.isnan().nonzero().tolist() == [[0, 0], [0, 1]]
    grads, dots = swiglu_kernels.swiglu_rows_backward(
        normal(1, 64), gate_up, normal(1, 128), expert, normal(1), LIMIT, None
    )
    assert grads.isnan().nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert dots.isnan().all()


@pytest.mark.skipif(INTERPRETED, reason="needs the memory of a GPU")
def test_activations_beyond_31_bits():
    width, count = 2880, 400_000  # 2.3e9 elements of gate_up
    gate_up = torch.zeros(count, 2 * width, device=DEVICE, dtype=DTYPE)
    gate_up[-3:] = normal(3, 2 * width)
    bias, expert = normal(2, 2 * width), torch.ones(count, dtype=torch.int32, device=DEVICE)
    exact = swiglu.swiglu_rows_torch(*wide(gate_up[-3:], bias, expert[-3:]), LIMIT)
    act = swiglu_kernels.swiglu_rows(gate_up, bias, expert, LIMIT)
    last = act[-3:]
    check(lambda: last, exact)
    score = normal(count)
    arguments = last, gate_up[-3:], bias, expert[-3:], score[-3:]
    exact = swiglu.swiglu_rows_backward_torch(*wide(*arguments), LIMIT)
    grads, dots = swiglu_kernels.swiglu_rows_backward(
        act, gate_up, bias, expert, score, LIMIT, gate_up
    )
    ours = grads[-3:].clone(), dots[-3:]
    check(lambda: ours, exact)


@pytest.mark.skipif(INTERPRETED, reason="needs the memory of a GPU")
def test_rows_beyond_31_bits():
    width, count = 2880, 400_000
    x = normal(1, width).expand(count, width).contiguous()
    places = torch.arange(2 * count, dtype=torch.int32, device=DEVICE).view(count, 2)
    rows_RH = rows_kernels.spread_rows(x, places)
    assert torch.equal(rows_RH[-3:], x[:3])
    row = torch.arange(2 * count - 6, 2 * count, dtype=torch.int32, device=DEVICE).view(3, 2)
    assert torch.equal(rows_kernels.combine_rows(rows_RH, row, *[None] * 7), 2 * x[:3])
