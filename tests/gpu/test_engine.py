"""The engine on a CUDA device: every backend and policy against the plain model in float32."""

import pytest
import torch

from nexus_cli import embedded
from nexus_cli.core.model.gpt_oss.engine.attach import attach_engine
from nexus_cli.core.model.gpt_oss.engine.memory import EVERYTHING, NOTHING, Kept
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.surgery import trainable_names
from nexus_cli.core.train.precision import promote

pytestmark = pytest.mark.gpu

BACKENDS = ["torch", "dequant", "fused", "bf16", "auto"]
B, S = 3, 200


@pytest.fixture(scope="module")
def converted(nexus, tmp_path_factory):
    root = tmp_path_factory.mktemp("engine") / "run"
    for command in (
        ["convert", "--input", embedded.MODEL_DIR, "--init-strategy", "random", "-w", root],
    ):
        done = nexus(*command)
        assert done.returncode == 0, done.stderr
    return root / "convert" / "model"


def make(folder, dtype, *, backend=None):
    """A model with open gates; plain, or through the engine."""
    model = load_model(folder, device="cuda", dtype=dtype)
    model.model.engine = None
    masters = promote(model, trainable_names(model, train_router=True))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, master in masters.items():
            if "shared_expert" in name:
                scale = 0.3 if name.endswith("output_gate") else 0.02
                noise = torch.randn(master.shape, generator=generator) * scale
                master.add_(noise.to(master.device))
    engine = None if backend is None else attach_engine(model, experts_backend=backend)
    return model, engine


def run(model):
    torch.manual_seed(1)
    ids = torch.randint(0, 8000, (B, S)).cuda()
    positions = torch.cat((torch.arange(70), torch.arange(130))).expand(B, S).cuda()
    model.zero_grad()
    out = model.model(
        input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True
    )
    weight = torch.randn(out.last_hidden_state.shape).cuda()
    (out.last_hidden_state.float() * weight).sum().backward()
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.last_hidden_state.detach().clone(), grads


def relative(ours, truth):
    return float((ours.float() - truth.float()).norm() / truth.float().norm())


@pytest.fixture(scope="module")
def truth(converted):
    """The plain model in float32, and how far the plain model in bf16 is from it."""
    hidden, grads = run(make(converted, torch.float32)[0])
    plain, plain_grads = run(make(converted, torch.bfloat16)[0])
    errors = {name: relative(plain_grads[name], grad) for name, grad in grads.items()}
    return hidden, grads, relative(plain, hidden), errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_is_as_near_to_float32_as_the_plain_bf16_model(converted, truth, backend):
    hidden, grads, plain_error, plain_errors = truth
    ours, our_grads = run(make(converted, torch.bfloat16, backend=backend)[0])
    assert relative(ours, hidden) < 1.2 * plain_error
    errors = {name: relative(our_grads[name], grad) for name, grad in grads.items()}
    mean = sum(errors.values()) / len(errors)
    assert mean < 1.2 * sum(plain_errors.values()) / len(plain_errors)
    for name, error in errors.items():
        # A gate's gradient is one number, a sum that cancels.
        slack = 0.1 if name.endswith("output_gate") else 0.01
        assert error < 2 * plain_errors[name] + slack, name


@pytest.mark.parametrize("kept", [NOTHING, Kept(True, False, False, False)], ids=str)
def test_what_is_kept_changes_no_bit(converted, kept):
    model, engine = make(converted, torch.bfloat16, backend="auto")
    engine.kept = (EVERYTHING,) * len(engine.kept)
    hidden, grads = run(model)
    engine.kept = (kept,) * len(engine.kept)
    again, grads_again = run(model)
    assert torch.equal(hidden, again)
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(converted, backend):
    model, _ = make(converted, torch.bfloat16, backend=backend)
    hidden, grads = run(model)
    again, grads_again = run(model)
    assert torch.equal(hidden, again)
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name


def losses(model, steps=20):
    """A short training run on one batch, by AdamW over the masters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    torch.manual_seed(5)
    ids = torch.randint(0, 8000, (4, 128)).cuda()
    curve = []
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = (hidden @ model.lm_head.weight.T).float()[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return torch.tensor(curve)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_give_the_loss_curve_of_the_plain_model(converted, backend):
    truth = losses(make(converted, torch.float32)[0])
    noise = (losses(make(converted, torch.bfloat16)[0]) - truth).abs().max()
    ours = losses(make(converted, torch.bfloat16, backend=backend)[0])
    assert truth[-1] < truth[0] - 1  # it learns
    assert (ours - truth).abs().max() < 3 * noise + 0.02


def test_a_decoded_layer_gives_back_its_packed_bytes(converted):
    model, engine = make(converted, torch.bfloat16, backend="auto")
    before, _ = run(model)
    engine.decode(1)
    after, _ = run(model)
    assert relative(after, before) < 0.02
    assert model.model.layers[0].mlp.experts.down_proj_blocks.numel() == 0


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_layer_works_around_the_experts(converted, truth):
    hidden, grads, plain_error, plain_errors = truth
    model, _ = make(converted, torch.bfloat16)
    for layer in model.model.layers:
        layer.compile(fullgraph=False)
    compiled, compiled_grads = run(model)
    assert relative(compiled, hidden) < 1.2 * plain_error
    errors = [relative(compiled_grads[name], grad) for name, grad in grads.items()]
    assert sum(errors) < 1.2 * sum(plain_errors.values())


def test_stock_transformers_uses_the_kernels_where_nexus_is_installed(converted):
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(
        converted, trust_remote_code=True, dtype=torch.bfloat16, device_map="cuda"
    )
    seen = []
    module = __import__("sys").modules[type(stock).__module__]
    original = module.routed_experts
    module.routed_experts = lambda *a, **k: seen.append(1) or original(*a, **k)
    try:
        ids = torch.randint(0, 8000, (1, 16)).cuda()
        logits = stock(input_ids=ids).logits
    finally:
        module.routed_experts = original
    assert len(seen) == stock.config.num_hidden_layers
    assert logits.isfinite().all()


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_graph_gives_the_same_bits_as_the_launches_that_it_was_made_of(converted, accumulates):
    model, engine = make(converted, torch.bfloat16, backend="auto")
    expected = [run(model), run(model)]
    engine.capture(B, S, accumulates=accumulates)
    for hidden, grads in expected:  # the first run captures, the second replays
        ours, our_grads = run(model)
        assert torch.equal(ours, hidden)
        assert our_grads.keys() == grads.keys()
        for name, grad in grads.items():
            assert torch.equal(our_grads[name], grad), name


def test_a_graph_is_captured_while_somebody_holds_the_gradients_nodes(converted):
    model, engine = make(converted, torch.bfloat16, backend="auto")
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [p.expand_as(p).grad_fn.next_functions[0][0] for p in trained]  # as DDP does
    hidden, grads = run(model)
    engine.capture(B, S, accumulates=False)
    ours, our_grads = run(model)
    assert torch.equal(ours, hidden)
    assert all(torch.equal(our_grads[name], grad) for name, grad in grads.items())
    assert all(node.variable is p for node, p in zip(held, trained, strict=True))


def test_a_graph_sums_micro_batches_and_is_its_own_teacher(converted):
    model, engine = make(converted, torch.bfloat16, backend="auto")

    def twice():
        torch.manual_seed(7)
        model.zero_grad()
        outputs = []
        for _ in range(2):
            ids = torch.randint(0, 8000, (B, S)).cuda()
            with torch.no_grad():
                teacher = model.model(input_ids=ids, use_cache=False, shared_experts=False)
            out = model.model(input_ids=ids, use_cache=False).last_hidden_state
            (out.float() - teacher.last_hidden_state.float()).square().sum().backward()
            outputs += [teacher.last_hidden_state, out.detach().clone()]
        return outputs, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    outputs, grads = twice()
    engine.capture(B, S, accumulates=True)
    for _ in range(2):
        ours, our_grads = twice()
        assert all(map(torch.equal, ours, outputs))
        assert all(map(torch.equal, our_grads, grads))
