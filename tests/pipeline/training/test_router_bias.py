"""``--train-router-bias``: the routers' biases move, and their weights do not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.engine.attach import attach_engine
from nexus_cli.core.model.gpt_oss.export import original_routers
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.metrics import read_metrics
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import train
from nexus_cli.pipeline.training.assemble import load_models
from nexus_cli.pipeline.training.request import online_request

CPU = torch.device("cpu")
LIVELY = {"router_learning_rate": 1e-2}


def is_bias(name):
    return name.endswith(".mlp.router.bias")


def frozen_files(directory):
    return {path.name: sha256_file(path) for path in directory.glob("model-*.safetensors")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_config):
    """The folder of three steps in which the biases learned."""
    root = tmp_path_factory.mktemp("router-bias")
    config = make_config(
        max_steps=3,
        train_router_bias=True,
        optimizer=LIVELY,
        runtime={"device": "cpu", "watch_every": 1},
        output=root / "run",
    )
    train.run_online(config, Workspace(root / "workspace"))
    return root / "run"


def test_biases_and_shared_experts_are_all_that_a_checkpoint_adds(trained, tiny_converted_dir):
    start = load_model(tiny_converted_dir, device="cpu", dtype=torch.float32).state_dict()
    shared = set(load_file(tiny_converted_dir / "nexus-trained.safetensors"))
    learned = load_file(trained / "checkpoint-3" / "nexus-trained.safetensors")
    biases = {name for name in learned if is_bias(name)}
    assert len(biases) == 2
    assert learned.keys() == shared | biases
    assert all(not torch.equal(learned[name].float(), start[name]) for name in learned)
    assert frozen_files(trained / "checkpoint-3") == frozen_files(tiny_converted_dir)


def test_everything_else_is_byte_for_byte_as_it_was(trained, tiny_converted_dir):
    learned = load_file(trained / "checkpoint-3" / "nexus-trained.safetensors")
    before = load_model(tiny_converted_dir, device="cpu").state_dict()
    after = load_model(trained / "checkpoint-3", device="cpu").state_dict()
    assert before.keys() == after.keys()
    still = before.keys() - learned.keys()
    assert sum(name.endswith(".mlp.router.weight") for name in still) == 2
    assert all(torch.equal(before[name], after[name]) for name in still)


def test_losses_that_act_on_routers_act_on_the_biases(trained):
    final = [record for record in read_metrics(trained) if "loss" in record][-1]
    assert final["load_balance"] > 0
    assert final["router_z"] > 0
    assert final["drift_l1"] > 0


@pytest.mark.parametrize("engine", [False, True])
def test_weights_have_no_gradient_and_biases_that_of_a_whole_trained_router(
    make_config, tmp_path, engine
):
    def gradients(**changes):
        config = make_config(**changes)
        models = load_models(online_request(config, Workspace(tmp_path), 1), World(0, 1, CPU), CPU)
        model = models.step.model
        if engine:
            attach_engine(model, experts_backend="torch")
        ids = torch.arange(24)[None] * 7
        model.model(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if ".router." in name}

    alone, whole = gradients(train_router_bias=True), gradients(train_router=True)
    for name, gradient in alone.items():
        if is_bias(name):
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, whole[name])
        else:
            assert gradient is None


def test_a_student_with_trained_biases_is_taught_by_the_original_routers(
    trained, tiny_model_dir, make_config, tmp_path
):
    checkpoint = trained / "checkpoint-3"
    assert original_routers(checkpoint).keys() == {
        f"model.layers.{layer}.mlp.router.bias" for layer in range(2)
    }
    config = make_config(student=str(checkpoint))  # its router is frozen from here on
    models = load_models(online_request(config, Workspace(tmp_path), 1), World(0, 1, CPU), CPU)
    base = load_model(tiny_model_dir, device="cpu", dtype=torch.float32).state_dict()
    taught = models.teacher._frozen
    assert len(taught) == 4
    for name, tensor in taught.items():
        assert torch.equal(tensor, base["model." + name].float())


def test_stock_transformers_loads_the_checkpoint_with_its_biases(trained):
    script = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
state = model.state_dict()
learned = load_file(folder + "/nexus-trained.safetensors")
assert sum(name.endswith(".router.bias") for name in learned) == 2
for name, tensor in learned.items():
    assert torch.equal(state[name].float(), tensor.float()), name
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(trained / "checkpoint-3")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("asks", "other"),
    [
        ({"freeze_router": True}, "--freeze-router"),
        ({"train_router": True}, "--train-router,"),
        ({"schedule": {"advanced": True}}, "--use-advanced-scheduler"),
    ],
)
def test_biases_alone_contradict_every_other_wish_for_the_router(make_config, asks, other):
    with pytest.raises(ValueError, match="--train-router-bias") as caught:
        make_config(train_router_bias=True, **asks)
    assert "contradicts" in str(caught.value)
    assert other in str(caught.value)
    assert "2 validation errors" not in str(caught.value)


def test_a_dry_run_counts_the_biases(make_config, tmp_path, capsys):
    config = make_config(output=tmp_path / "run", train_router_bias=True)
    train.run_online(config, Workspace(tmp_path / "workspace"), dry_run=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "train router biases │ 16 parameters" in shown  # two layers of eight experts
