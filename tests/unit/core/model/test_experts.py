"""The routed block against plain autograd in float64, and the decoder against transformers'."""

import pytest
import torch
from torch.autograd import gradcheck
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import (
    FrozenExperts,
    GptOssSharedExpert,
    clamped_swiglu,
    dequantize_mxfp4,
)

E, H, I, T, K = 5, 32, 64, 7, 2  # noqa: E741
LIMIT = 7.0


@pytest.fixture
def block():
    """Random bytes as weights: values up to 6 * 2^2, so that both clamps are met."""
    torch.manual_seed(0)

    def packed(rows, columns):
        blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 127, (E, rows, columns // 32), dtype=torch.uint8)
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


def loop(x, scores, experts, gate_up, gate_up_bias, down, down_bias):
    """Token by token, expert by expert, in whatever dtype the input has."""
    rows = []
    for token in range(x.shape[0]):
        total = torch.zeros(H, dtype=x.dtype)
        for score, expert in zip(scores[token], experts[token], strict=True):
            mixed = dequantize_mxfp4(*gate_up, x.dtype)[expert] @ x[token] + gate_up_bias[expert]
            gate = torch.minimum(mixed[0::2], torch.tensor(LIMIT, dtype=x.dtype))
            up = mixed[1::2].clamp(-LIMIT, LIMIT)
            hidden = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
            out = dequantize_mxfp4(*down, x.dtype)[expert] @ hidden + down_bias[expert]
            total = total + score * out
        rows.append(total)
    return torch.stack(rows)


def test_gradients_pass_gradcheck(block):
    x, scores, experts = inputs()
    assert gradcheck(
        lambda x, s: FrozenExperts.apply(x, s, experts, *block, LIMIT), (x, scores), atol=1e-5
    )


@pytest.mark.parametrize(
    "experts",
    [
        None,
        torch.zeros(T, K, dtype=torch.int64),
        torch.tensor([[4, 0]] * T),
    ],
    ids=["spread", "all on one", "three experts empty"],
)
def test_the_block_equals_a_loop_over_tokens_with_autograd(block, experts):
    x, scores, experts = inputs(experts)
    ours = FrozenExperts.apply(x, scores, experts, *block, LIMIT)
    expected = loop(x, scores, experts, *block)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-10)

    weight = torch.randn_like(expected)
    ours_grads = torch.autograd.grad((ours * weight).sum(), (x, scores))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (x, scores))
    torch.testing.assert_close(ours_grads, expected_grads, rtol=1e-11, atol=1e-9)


def test_one_token_and_no_gradient(block):
    x, scores, experts = inputs()
    with torch.no_grad():
        one = FrozenExperts.apply(x[:1], scores[:1], experts[:1], *block, LIMIT)
        many = FrozenExperts.apply(x, scores, experts, *block, LIMIT)
    torch.testing.assert_close(one, many[:1], rtol=1e-12, atol=1e-12)


def test_the_backward_pass_keeps_no_more_than_it_says(block):
    kept = []

    def note(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    x, scores, experts = inputs()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        FrozenExperts.apply(x, scores, experts, *block, LIMIT)
    gate_up, gate_up_bias, down, down_bias = block
    frozen = sum(t.numel() * t.element_size() for t in (*gate_up, gate_up_bias, *down, down_bias))
    pre_activation, routing = T * K * 2 * I * 8, T * K * (8 + 8)
    assert sum(kept) == frozen + pre_activation + routing


def test_every_byte_and_scale_decodes_as_in_transformers():
    byte = torch.arange(256, dtype=torch.uint8)
    blocks = byte.repeat(256).view(256, 256 // 16, 16)  # each row holds every byte once
    scales = byte[:, None].expand(256, 256 // 16).contiguous()
    ours = dequantize_mxfp4(blocks, scales, torch.bfloat16)
    # theirs is the transpose of the weight
    theirs = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.bfloat16)
    theirs = theirs.transpose(1, 2)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_decoding_is_exact_in_every_dtype():
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (8, 4, 16), dtype=torch.uint8)
    scales = torch.randint(0, 255, (8, 4), dtype=torch.uint8)
    exact = dequantize_mxfp4(blocks, scales, torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(dequantize_mxfp4(blocks, scales, dtype).double(), exact)


def test_the_shared_expert_gives_its_gate_a_gradient_at_step_one_and_its_weights_at_step_two():
    torch.manual_seed(0)
    expert = GptOssSharedExpert(16, 8)
    x = torch.randn(5, 16)
    expert(x).square().sum().backward()
    assert expert.output_gate.grad.item() == 0  # the output itself is zero
    expert.zero_grad()
    (expert(x) * torch.randn(5, 16)).sum().backward()
    assert expert.output_gate.grad.item() != 0
    assert not expert.down_proj.weight.grad.any()
    expert.output_gate.data.fill_(0.1)
    (expert(x) * torch.randn(5, 16)).sum().backward()
    assert expert.down_proj.weight.grad.any()


def test_the_shared_expert_keeps_fp32_masters_beside_a_bf16_model():
    expert = GptOssSharedExpert(16, 8)
    expert.output_gate.data.fill_(1.0)
    out = expert(torch.randn(3, 16, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.float32
    assert expert.up_proj.weight.grad.dtype == torch.float32


def test_the_activation_is_gpt_oss_own():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    theirs = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=16, num_local_experts=1))
    gate_up = torch.randn(4, 32) * 6
    expected = theirs._apply_gate(gate_up)
    assert torch.equal(clamped_swiglu(gate_up[..., ::2], gate_up[..., 1::2], LIMIT), expected)
