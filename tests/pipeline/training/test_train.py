"""``nexus train``: what it learns, what it leaves alone, what it writes, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from nexus_cli.config.train import TrainConfig, weights_of
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.train import step
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError, WorkspaceError
from nexus_cli.io import model_dir
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.metrics import MetricsWriter, read_metrics
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import train


def frozen_files(directory):
    return {path.name: sha256_file(path) for path in directory.glob("model-*.safetensors")}


def test_ten_steps_twice_give_the_same_numbers_bit_for_bit(run, losses, trained_bytes):
    first, second = run("first"), run("second")
    assert losses(first) == losses(second)
    assert len(losses(first)) == 10
    assert trained_bytes(first / "checkpoint-10") == trained_bytes(second / "checkpoint-10")


def test_training_lowers_the_loss_and_moves_nothing_that_is_frozen(run, tiny_converted_dir):
    before = frozen_files(tiny_converted_dir)
    start = load_file(tiny_converted_dir / "nexus-trained.safetensors")
    directory = run(max_steps=40, evaluation={"every": 20, "sequences": 4})
    checkpoint = directory / "checkpoint-40"
    assert frozen_files(tiny_converted_dir) == before
    assert frozen_files(checkpoint) == before
    trained = load_file(checkpoint / "nexus-trained.safetensors")
    assert trained.keys() == start.keys()  # the shared experts and gates, no router
    assert all(not torch.equal(trained[name], start[name]) for name in trained)
    evaluations = [r["eval"] for r in read_metrics(directory) if "eval" in r]
    domain = next(name for name in evaluations[0] if name.endswith("domain.jsonl"))
    assert evaluations[-1][domain]["loss"] < evaluations[0][domain]["loss"] - 0.01
    assert evaluations[0][domain]["kd"] == pytest.approx(0.0, abs=1e-6)
    assert evaluations[-1][domain]["kd"] > 0
    loss = evaluations[-1][domain]["loss"]
    assert evaluations[-1][domain]["perplexity"] == pytest.approx(math.exp(loss))


def test_the_first_step_of_a_closed_gate_has_no_divergence_at_all(run, losses):
    first = losses(run(max_steps=1))[0]
    assert first["kd"] == 0.0
    assert first["drift_kl"] == 0.0
    assert first["drift_topk_overlap"] == 1.0


def test_a_checkpoint_is_a_whole_model_with_the_masters_rounded_once(run):
    checkpoint = run(max_steps=4) / "checkpoint-4"
    assert model_dir.read_shape(checkpoint).num_shared_experts == 1
    loaded = dict(load_model(checkpoint, device="cpu", dtype=torch.bfloat16).named_parameters())
    masters = load_file(checkpoint / "training_state" / "masters.safetensors")
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(loaded[name], master.to(loaded[name].dtype))
        if name.endswith("output_gate"):
            assert loaded[name].dtype == torch.float32
            assert float(master.abs()) > 0


def test_the_router_stays_unless_asked_and_then_is_in_the_checkpoint(run, tiny_converted_dir):
    directory = run(max_steps=3, train_router=True, optimizer={"router_learning_rate": 1e-2})
    trained = load_file(directory / "checkpoint-3" / "nexus-trained.safetensors")
    routers = {name for name in trained if ".mlp.router." in name}
    assert len(routers) == 4
    start = load_model(tiny_converted_dir, device="cpu", dtype=torch.float32).state_dict()
    assert all(not torch.equal(trained[name].float(), start[name]) for name in routers)
    final = [record for record in read_metrics(directory) if "loss" in record][-1]
    assert final["load_balance"] > 0
    assert final["router_z"] > 0


def test_the_advanced_scheduler_trains_the_router_at_its_temperatures(run, losses):
    records = losses(run(schedule={"advanced": True}))
    assert records[0]["temperature"] == 4.0
    assert records[-1]["temperature"] == 2.0
    assert records[0]["learning_rate"] < records[5]["learning_rate"]
    assert records[0]["kd_weight"] < records[5]["kd_weight"]


def test_a_teacher_model_says_what_the_student_itself_would(run, losses, tiny_model_dir):
    itself = losses(run("self", max_steps=5))
    model = losses(run("model", max_steps=5, teacher={"model": str(tiny_model_dir)}))
    for mine, theirs in zip(itself, model, strict=True):
        for name in ("loss", "ce", "kd", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-7)


def test_a_teacher_with_another_head_is_refused(run, make_tiny_model, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match="head differs"):
        run(teacher={"model": str(other)})


def test_accumulation_changes_neither_losses_nor_gradients(run, losses):
    whole = losses(run("whole", batch_size=4, max_steps=4))
    split = losses(run("split", batch_size=1, gradient_accumulation_steps=4, max_steps=4))
    for mine, theirs in zip(whole, split, strict=True):
        for name in ("loss", "ce", "kd", "grad_norm", "tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7)


def test_weight_averaging_pulls_back_to_the_start(run):
    free, held = run("free"), run("held", averaging={"every": 10, "beta": 1.0})
    start, _ = (sorted(d.glob("checkpoint-10"))[0] for d in (held, free))
    events = [r for r in read_metrics(held) if r.get("event") == "sfa"]
    assert [event["step"] for event in events] == [10]
    gates = load_file(start / "nexus-trained.safetensors")
    assert all(float(t.abs()) == 0 for n, t in gates.items() if n.endswith("output_gate"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_what_was_saved(
    run, tmp_path, monkeypatch
):
    real = step.DistillationStep.forward
    calls = []

    def broken(self, batch, signal, scale):
        output = real(self, batch, signal, scale)
        calls.append(1)
        if len(calls) != 7:
            return output
        bad = output.loss * float("nan")
        return step.StepOutput(bad, output.sums | {"loss": bad.detach().double()})

    monkeypatch.setattr(step.DistillationStep, "forward", broken)
    with pytest.raises(ArtifactError, match=r"loss is nan in step 7.*batch of sequences \[\d+"):
        run()
    directory = tmp_path / "run"
    assert [path.name for path in sorted(directory.glob("checkpoint-*"))] == ["checkpoint-5"]
    state = load_file(directory / "checkpoint-5" / "training_state" / "masters.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_student_without_shared_experts_is_refused(run, tiny_model_dir):
    with pytest.raises(ConfigError, match="no shared expert") as caught:
        run(student=str(tiny_model_dir))
    assert "nexus convert" in str(caught.value.hint)


def test_a_workspace_without_a_student_says_which_command_makes_one(run):
    with pytest.raises(WorkspaceError, match="no finished 'convert' stage") as caught:
        run(student=None)
    assert "nexus convert" in str(caught.value.hint)


def test_a_device_that_is_not_there_is_an_error_at_once(run, tiny_model_dir):
    with pytest.raises(ResourceError, match="cuda:98"):
        run(runtime={"device": "cuda:98"})
    with pytest.raises(ResourceError, match="teacher"):
        run(
            teacher={"model": str(tiny_model_dir)},
            runtime={"device": "cpu", "teacher_device": "cuda:99"},
        )


@pytest.mark.parametrize("asks", [{"train_router": True}, {"schedule": {"advanced": True}}])
def test_a_router_cannot_be_frozen_and_trained(make_config, asks):
    with pytest.raises(ValueError, match="--freeze-router contradicts"):
        make_config(freeze_router=True, **asks)


def test_router_losses_need_a_router_that_trains(make_config):
    with pytest.raises(ValueError, match="router is frozen"):
        make_config(loss={"load_balance": 0.1})


def test_replay_sources_keep_to_kl_only_beside_something_to_learn():
    mixed = TrainConfig(data={"sources": "nemotron-code,nemotron-general"})
    alone = TrainConfig(data={"sources": "nemotron-general"})

    def weights(config):
        return [
            (w.ce, w.kd)
            for w in weights_of(config.loss, [(s.name, s.loss) for s in config.data.sources])
        ]

    assert weights(mixed) == [(1.0, 0.1), (0.0, 1.0)]
    assert weights(alone) == [(1.0, 0.1)]


def test_gradient_checkpointing_changes_no_number(run, losses):
    plain = losses(run("plain", max_steps=3))
    runtime = {"device": "cpu", "gradient_checkpointing": True}
    assert losses(run("saving", max_steps=3, runtime=runtime)) == plain


def test_a_dry_run_prints_the_plan_and_writes_nothing(make_config, tmp_path, capsys):
    config = make_config(output=tmp_path / "run", gradient_accumulation_steps=3)
    train.run_online(config, Workspace(tmp_path / "workspace"), dry_run=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "10 optimizer steps of 6 sequences" in shown
    assert "train shared experts │ 12,544 parameters" in shown
    assert "train gates │ 2 parameters" in shown
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "workspace").exists()


def test_a_dry_run_says_what_does_not_fit(make_config, tmp_path):
    config = make_config(output=tmp_path / "run", batch_size=10**9)
    with pytest.raises(ResourceError, match="needs about") as caught:
        train.run_online(config, Workspace(tmp_path / "workspace"), dry_run=True)
    assert "would fit in" in caught.value.hint
    assert "--batch-size" in caught.value.hint


def test_a_dry_run_estimates_the_time_from_the_run_that_was_there(make_config, tmp_path, capsys):
    def told(**changes):
        config = make_config(output=tmp_path / "run", **changes)
        train.run_online(config, Workspace(tmp_path / "workspace"), dry_run=True)
        return " ".join(capsys.readouterr().out.split())

    assert "not known yet: the run's log says it after 5 steps" in told()
    (tmp_path / "run").mkdir()
    measured = {
        ("start", "cpu"): (1.0, 64.0, 64.0),  # the first step warms up
        ("resume", "cuda:0"): (1e6, 1e6, 1e6),  # another device
    }
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl") as writer:
        for (event, device), rates in measured.items():
            writer.write({"step": 0, "event": event, "device": device})
            for number, rate in enumerate(rates, start=1):
                writer.write({"step": number, "loss": 1.0, "tokens_per_second": rate})
    # 10 steps of 2 sequences of 32 tokens
    assert "about 10 s in steps, at the 64 tokens/s that the run" in told()
    assert "about 20 s in steps" in told(batch_size=4)
