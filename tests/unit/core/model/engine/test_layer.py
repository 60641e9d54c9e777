"""The fused layers against the plain model with autograd, in float64, under every policy."""

import copy
from itertools import product

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from nexus_cli.core.model.gpt_oss.engine.attach import attach_engine
from nexus_cli.core.model.gpt_oss.engine.memory import NOTHING, Kept
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.surgery import trainable_names

POLICIES = [NOTHING] + [
    Kept(True, qkv, gate_up, shared) for qkv, gate_up, shared in product((True, False), repeat=3)
]
B, S = 2, 40  # longer than the window of 16


def make_model(folder):
    """In float64, with open gates and livelier shared experts."""
    torch.manual_seed(0)
    model = load_model(folder, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if "shared_expert" in name:
            parameter.data = parameter.data.double()
            parameter.data += torch.randn_like(parameter) * 0.2
    return model


@pytest.fixture(scope="module", autouse=True)
def _norms_in_float64():
    """transformers' norm computes in float32 whatever it is given: that would blur the oracle."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GptOssRMSNorm, "forward", forward)
        yield


@pytest.fixture(scope="module")
def pair(tiny_converted_dir):
    """The plain model and the same with the engine on."""
    plain = make_model(tiny_converted_dir)
    fused = copy.deepcopy(plain)
    return plain, attach_engine(fused, experts_backend="torch"), fused


def inputs():
    torch.manual_seed(1)
    ids = torch.randint(0, 8000, (B, S))
    # two documents in the first sequence, three in the second
    positions = torch.stack(
        (
            torch.cat((torch.arange(25), torch.arange(15))),
            torch.cat((torch.arange(3), torch.arange(30), torch.arange(7))),
        )
    )
    return ids, positions


def run(
    model,
    *,
    train_router,
    router_loss,
    train_router_bias=False,
    embeddings_grad=False,
    shared_experts=True,
):
    """A scalar of everything that flows out, and its gradients."""
    ids, positions = inputs()
    names = trainable_names(model, train_router=train_router, train_router_bias=train_router_bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None
    embedded = model.model.embed_tokens(ids).detach().requires_grad_(embeddings_grad)
    out = model.model(
        inputs_embeds=embedded,
        position_ids=positions,
        use_cache=False,
        shared_experts=shared_experts,
        output_router_logits=True,
    )
    torch.manual_seed(2)
    loss = (out.last_hidden_state * torch.randn_like(out.last_hidden_state)).sum()
    if router_loss:
        loss = loss + sum((x * torch.randn_like(x)).sum() for x in out.router_logits)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if embeddings_grad:
        grads["x"] = embedded.grad
    return out, grads


def assert_same(ours, theirs):
    (out, grads), (expected, expected_grads) = ours, theirs
    torch.testing.assert_close(
        out.last_hidden_state, expected.last_hidden_state, rtol=1e-9, atol=1e-9
    )
    for one, other in zip(out.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("kept", POLICIES, ids=str)
def test_values_and_gradients_do_not_depend_on_what_is_kept(pair, kept):
    plain, engine, fused = pair
    engine.kept = (kept,) * 2
    settings = {"train_router": False, "router_loss": False}
    assert_same(run(fused, **settings), run(plain, **settings))


@pytest.mark.parametrize("kept", [POLICIES[0], POLICIES[1], POLICIES[-1]], ids=str)
@pytest.mark.parametrize("train_router", [True, False])
@pytest.mark.parametrize("embeddings_grad", [True, False])
def test_routers_and_the_input_have_their_gradients(pair, kept, train_router, embeddings_grad):
    plain, engine, fused = pair
    engine.kept = (kept,) * 2
    settings = {
        "train_router": train_router,
        "router_loss": True,
        "embeddings_grad": embeddings_grad,
    }
    assert_same(run(fused, **settings), run(plain, **settings))


@pytest.mark.parametrize("bias_alone", [True, False])
def test_the_router_weight_has_a_gradient_computed_only_if_it_trains(pair, monkeypatch, bias_alone):
    from nexus_cli.core.model.gpt_oss.engine import layer

    plain, engine, fused = pair
    engine.kept = (Kept(),) * 2
    calls, original = [], layer.weight_gradient

    def note(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(layer, "weight_gradient", note)
    settings = {
        "train_router": not bias_alone,
        "train_router_bias": bias_alone,
        "router_loss": True,
    }
    ours = run(fused, **settings)
    assert len(calls) == (0 if bias_alone else 2)
    assert sum(name.endswith("router.bias") for name in ours[1]) == 2
    assert_same(ours, run(plain, **settings))


def test_without_shared_experts_the_layers_are_the_original_ones(pair):
    plain, engine, fused = pair
    engine.kept = (POLICIES[1],) * 2
    settings = {
        "train_router": True, "router_loss": False, "embeddings_grad": True,
        "shared_experts": False,
    }  # fmt: skip
    assert_same(run(fused, **settings), run(plain, **settings))


def test_nothing_is_computed_below_the_first_trained_parameter(pair, monkeypatch):
    from nexus_cli.core.model.gpt_oss.engine import layer

    _, engine, fused = pair
    engine.kept = (Kept(),) * 2
    seen = []
    original = layer._attention_backward

    def note(*args):
        seen.append(args[0].kind)
        return original(*args)

    monkeypatch.setattr(layer, "_attention_backward", note)
    run(fused, train_router=False, router_loss=False)
    assert seen == ["full_attention"]  # the second layer; the first one's input wants no gradient


def test_a_layer_keeps_what_its_policy_counts(pair):
    _, engine, fused = pair
    sizes = {}
    for kept in (POLICIES[0], POLICIES[1], POLICIES[-1]):
        engine.kept = (kept,) * 2
        total = {}

        def note(tensor, total=total):
            total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids, positions = inputs()
        parameters = {p.untyped_storage().data_ptr() for p in fused.parameters()}
        embedded = fused.model.embed_tokens(ids).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            fused.model(inputs_embeds=embedded, position_ids=positions, use_cache=False)
        sizes[kept] = sum(size for place, size in total.items() if place not in parameters)
    layer, final_norm = engine.layer_bytes, B * S * (64 + 1) * 8
    for kept, size in sizes.items():
        counted = 2 * layer.kept(kept) * B * S  # of bf16, where this is float64
        assert counted * 3.2 < size - final_norm < counted * 4.1, (kept, size, counted)


def test_a_second_backward_pass_is_refused(pair):
    _, engine, fused = pair
    engine.kept = (Kept(),) * 2
    ids, positions = inputs()
    embedded = fused.model.embed_tokens(ids).detach().requires_grad_()
    out = fused.model(inputs_embeds=embedded, position_ids=positions, use_cache=False)
    loss = out.last_hidden_state.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_engine_refuses_what_it_cannot_run(tiny_converted_dir):
    model = load_model(tiny_converted_dir, dtype=torch.float32)
    with pytest.raises(ValueError, match="bfloat16 on a CUDA device, not in float32 on cpu"):
        attach_engine(model)
