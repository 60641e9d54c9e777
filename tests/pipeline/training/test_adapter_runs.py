"""Runs that write adapters, and runs that start from one: the same as with whole models."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.model.gpt_oss.adapter import apply_adapter, read_adapter
from nexus_cli.core.train.loop import Loop
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import manifest, model_dir
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import train, validate_models

CPU = {"device": "cpu", "save_every": 5}
ADAPTER = CPU | {"adapter": True}


class Killed(BaseException):
    """Ends a run where a kill would: nothing after it is done."""


@pytest.fixture
def kill_in_step(monkeypatch):
    """Run a block whose training dies before step ``number`` is taken."""
    real = Loop._step

    def arrange(number, start):
        def step(self, counts):
            if self.progress.step + 1 == number:
                raise Killed
            real(self, counts)

        with monkeypatch.context() as patched:
            patched.setattr(Loop, "_step", step)
            with pytest.raises(Killed):
                start()

    return arrange


def learned(checkpoint):
    """Hashes of everything in a checkpoint but the config, which names versions."""
    files = [file for file in checkpoint.rglob("*.safetensors") if file.is_file()]
    assert len(files) >= 4  # adapter, masters, moments, generators
    return {file.relative_to(checkpoint).as_posix(): sha256_file(file) for file in files}


@pytest.mark.parametrize("offline", [False, True], ids=["train", "train-offline"])
@pytest.mark.parametrize(
    "settings", [{}, {"train_router": True}, {"optimizer": {"kind": "adamw-8bit"}}], ids=str
)
def test_a_killed_adapter_run_goes_on_bit_for_bit(
    run, losses, teacher_store, kill_in_step, offline, settings
):
    teacher = {"teacher": {"store": str(teacher_store)}} if offline else {}
    settings = {"offline": offline, "runtime": ADAPTER, **teacher, **settings}
    whole = run("whole", **settings)
    kill_in_step(8, lambda: run("killed", **settings))
    directory = run("killed", **settings)
    assert losses(directory) == losses(whole)
    assert learned(directory / "checkpoint-10") == learned(whole / "checkpoint-10")


def test_its_checkpoints_are_those_of_a_run_of_models(run, losses, tiny_model_dir, tmp_path):
    models = run("models", train_router=True)
    adapters = run("adapters", train_router=True, runtime=ADAPTER)
    assert losses(adapters) == losses(models)
    for step in (5, 10):
        small, whole = (root / f"checkpoint-{step}" for root in (adapters, models))
        assert sorted(path.name for path in small.iterdir()) == [
            "adapter.safetensors",
            "local_base.json",
            "nexus_adapter.json",
            "training_state",
        ]
        assert (small / "adapter.safetensors").read_bytes() == (
            whole / "nexus-trained.safetensors"
        ).read_bytes()
    assert any(".router." in name for name in load_file(small / "adapter.safetensors"))
    apply_adapter(tmp_path / "again", tiny_model_dir, read_adapter(small))
    assert model_dir.fingerprint(tmp_path / "again") == model_dir.fingerprint(whole)
    record = manifest.read(tmp_path / "adapters.manifest.json")
    assert set(record.outputs) == {
        "metrics.jsonl",
        "checkpoint-10/nexus_adapter.json",
        "checkpoint-10/adapter.safetensors",
    }


def test_a_finished_adapter_run_is_not_run_again_and_the_form_is_no_other_run(run):
    directory = run(max_steps=2, runtime=ADAPTER)
    before = (directory / "metrics.jsonl").read_bytes()
    run(max_steps=2, runtime=ADAPTER)
    run(max_steps=2)
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_a_run_may_go_on_in_the_other_form(run, losses, kill_in_step, tmp_path):
    whole = run("whole")
    kill_in_step(8, run)
    directory = run(runtime=ADAPTER)
    assert losses(directory) == losses(whole)
    assert model_dir.is_model(directory / "checkpoint-5")
    assert model_dir.is_adapter(directory / "checkpoint-10")
    assert "checkpoint-10/adapter.safetensors" in manifest.read(
        tmp_path / "run.manifest.json"
    ).outputs  # fmt: skip


def test_a_named_adapter_checkpoint_is_gone_on_from_into_another_folder(run, losses):
    first = run("first", runtime=ADAPTER)
    named = ADAPTER | {"resume": str(first / "checkpoint-5")}
    second = run("second", runtime=named)
    assert losses(second) == losses(first)[5:]
    assert learned(second / "checkpoint-10") == learned(first / "checkpoint-10")


def test_old_adapter_checkpoints_go_as_models_do(run):
    directory = run(runtime=ADAPTER | {"save_every": 2, "keep_last": 3})
    assert sorted(path.name for path in directory.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-6",
        "checkpoint-8",
    ]
    assert len(list(directory.glob("*/training_state"))) == 2


def test_training_from_an_adapter_is_training_from_its_model(run, losses, tmp_path):
    first = run("first", runtime=ADAPTER, max_steps=4, train_router=True)
    whole = run("whole", max_steps=4, train_router=True)
    assert learned(first / "checkpoint-4").keys() != learned(whole / "checkpoint-4").keys()
    ends = {}
    for name, start in (("a", first / "checkpoint-4"), ("m", whole / "checkpoint-4")):
        ends[name] = run(name, student=str(start), max_steps=4, runtime=ADAPTER)
    assert losses(ends["a"]) == losses(ends["m"])
    assert learned(ends["a"] / "checkpoint-4") == learned(ends["m"] / "checkpoint-4")
    # The router trained before is frozen now, and still in the adapter.
    held = load_file(ends["a"] / "checkpoint-4" / "adapter.safetensors")
    before = load_file(first / "checkpoint-4" / "adapter.safetensors")
    router = "model.layers.0.mlp.router.weight"
    assert (held[router] == before[router]).all()
    assert len(list((tmp_path / "workspace" / "cache" / "adapters").glob("[0-9a-f]*"))) == 1


def test_validate_takes_the_last_adapter_of_the_workspace(make_config, tmp_path):
    workspace = Workspace(tmp_path)
    train.run_online(make_config(max_steps=2, runtime=ADAPTER), workspace)
    for config in (
        ValidateConfig(),
        ValidateConfig(checkpoint=str(workspace.stage_dir("train"))),
        ValidateConfig(checkpoint=str(workspace.stage_dir("train") / "checkpoint-2")),
    ):
        choice = validate_models.choose(config, workspace)
        assert choice.kind == "base"
        assert choice.model.path.parent == tmp_path / "cache" / "adapters"
        changes = validate_models.changes(choice)
        assert changes is not None
        assert not changes.frozen


def test_a_student_that_names_no_base_is_refused_before_the_first_step(
    run, tiny_converted_dir, tmp_path
):
    student = tmp_path / "student"
    student.mkdir()
    for file in tiny_converted_dir.iterdir():
        if file.name != "conversion_metadata.json":
            (student / file.name).symlink_to(file)
    with pytest.raises(ArtifactError, match="does not name its base") as caught:
        run(student=str(student), runtime=ADAPTER)
    assert "--adapter" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_no_teacher(run, tmp_path):
    first = run("first", runtime=ADAPTER, max_steps=2)
    with pytest.raises(ConfigError, match="is an adapter"):
        run("second", teacher={"model": str(first / "checkpoint-2")})
    assert not (tmp_path / "second").exists()
