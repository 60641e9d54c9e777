"""``nexus train-offline``: the same loop on a store, on one rank and on two."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io.metrics import read_metrics
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import precompute, train
from nexus_cli.pipeline.training import plan
from nexus_cli.pipeline.training.request import offline_request
from nexus_cli.pipeline.training.resume import NOT_IDENTITY
from nexus_cli.pipeline.training.text import passes


@pytest.fixture
def offline(run, teacher_store):
    def start(name="run", **changes):
        changes.setdefault("teacher", {"store": str(teacher_store)})
        return run(name, offline=True, **changes)

    return start


@pytest.fixture(scope="module")
def dense_store(make_store):
    """Four stored steps of the whole vocabulary in float32."""
    return make_store(num_steps=4, top_k=8256, top_p=1.0, values="float32")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_whole_vocabulary_store_teaches_what_the_teacher_in_memory_does(
    run, losses, dense_store, temperature
):
    lively = {
        "optimizer": {"learning_rate": 0.05, "gate_learning_rate": 0.2},
        "schedule": {"temperature": temperature},
    }
    online = losses(run("online", max_steps=4, **lively))
    # A store says which source a row is of, and the config what that source teaches.
    teacher = {"store": str(dense_store)}
    offline = losses(run("offline", offline=True, max_steps=None, teacher=teacher, **lively))
    assert len(offline) == 4
    assert offline[-1]["kd"] > 1e-6
    assert offline[-1]["temperature"] == temperature
    for mine, theirs in zip(offline, online, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        for name in ("loss", "ce", "kd", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def default_store(make_store):
    """Four stored steps as the command keeps them when it is told nothing else."""
    return make_store(num_steps=4)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_default_store_teaches_at_its_three_temperatures(
    offline, losses, default_store, temperature
):
    run = offline(
        teacher={"store": str(default_store)},
        max_steps=4,
        schedule={"temperature": temperature},
        optimizer={"learning_rate": 0.5, "gate_learning_rate": 1.0},
    )
    steps = losses(run)
    assert [step["temperature"] for step in steps] == [temperature] * 4
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert steps[0]["kd"] < 1e-2, "the student begins as its teacher, but for the codes"
    assert steps[-1]["kd"] > steps[0]["kd"]


def test_a_store_in_an_object_store_teaches_what_it_does_on_disk(
    offline, losses, default_store, s3
):
    remote = s3.upload(default_store, "train-offline/default")
    there = losses(offline("there", teacher={"store": remote}, max_steps=2))
    here = losses(offline("here", teacher={"store": str(default_store)}, max_steps=2))
    assert there == here
    assert len(there) == 2


@pytest.mark.parametrize(
    ("accumulation", "ranks", "batch_size", "steps"),
    [(1, 1, None, 20), (8, 2, None, 1), (3, 1, None, 6), (1, 1, 5, 8), (2, 2, None, 5)],
)
def test_steps_follow_from_the_store(
    make_config, teacher_store, tmp_path, accumulation, ranks, batch_size, steps
):
    config = make_config(
        teacher={"store": str(teacher_store)},
        gradient_accumulation_steps=accumulation,
        batch_size=batch_size,
        max_steps=None,
    )
    request = offline_request(config, Workspace(tmp_path), ranks)
    assert request.max_steps == steps
    if batch_size is None:
        said = plan.steps_sentence(request)
        assert said == f"20 stored steps / ({accumulation} x {ranks}) = {steps} optimizer steps"


def test_a_store_too_small_for_one_step_is_refused(offline):
    with pytest.raises(ConfigError, match="one optimizer step takes 42"):
        offline(gradient_accumulation_steps=21, max_steps=None)


@pytest.mark.parametrize(
    "schedule",
    [{"temperature": 3.0}, {"temperature": 2.0, "final_temperature": 1.0}],
    ids=["constant", "falling"],
)
def test_another_temperature_than_the_stores_is_refused(offline, schedule):
    with pytest.raises(ConfigError, match="holds the teacher at the temperatures 1, 2 and 4, not"):
        offline(schedule=schedule)


def test_router_kl_has_no_teacher_in_a_store(offline, text_data):
    sources = [source | {"loss": {"router": 1.0}} for source in text_data["sources"]]
    with pytest.raises(ConfigError, match="no router logits"):
        offline(data={"sources": sources})


def test_a_store_of_another_teacher_is_refused(offline, make_tiny_model, text_data, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=3)
    config = PrecomputeConfig(
        model=str(other),
        data=text_data,
        num_steps=2,
        batch_size=1,
        runtime={"device": "cpu"},
        output=tmp_path / "teacher",
    )
    precompute.run(config, Workspace(tmp_path / "workspace"))
    with pytest.raises(ArtifactError, match="another teacher"):
        offline(teacher={"store": str(tmp_path / "teacher")})


def test_a_store_and_a_teacher_model_contradict_each_other(run, teacher_store, tiny_model_dir):
    with pytest.raises(ConfigError, match="train-offline"):
        run(teacher={"store": str(teacher_store)})
    with pytest.raises(ConfigError, match="nexus train"):
        run(offline=True, teacher={"model": str(tiny_model_dir)})


def test_a_second_pass_reads_every_row_again_in_another_order():
    order = passes(7, 20, seed=0)
    assert np.array_equal(order[:7], np.arange(7))
    assert sorted(order[7:14]) == list(range(7))
    assert not np.array_equal(order[7:14], np.arange(7))
    assert np.array_equal(order, passes(7, 20, seed=0))
    assert np.array_equal(order[:9], passes(7, 9, seed=0))
    shuffled = passes(7, 20, seed=0, shuffle=True)
    assert sorted(shuffled[:7]) == sorted(shuffled[7:14]) == list(range(7))
    assert not np.array_equal(shuffled[:7], range(7))


def test_offline_text_comes_from_the_store_alone(offline, tmp_path):
    directory = offline(max_steps=2, data={"sources": "nemotron-code"})
    start = read_metrics(directory)[0]
    assert [name.rpartition("/")[2] for name in start["sources"]] == [
        "domain.jsonl",
        "replay.jsonl",
    ]
    assert not (tmp_path / "workspace" / "cache").exists()


def test_two_ranks_take_the_steps_of_one_with_twice_the_accumulation(
    make_config, tiny_converted_dir, teacher_store, losses, tmp_path
):
    flags = [
        *("train-offline", "--precomputed-teacher", teacher_store, "--freeze-router"),
        *("--student-model", tiny_converted_dir, "--device", "cpu", "--max-steps", "3"),
        *("--gradient-accumulation-steps", "2", "--output-dir", tmp_path / "two"),
        *("--workspace", tmp_path / "workspace", "--learning-rate", "0.05"),
        *("--set", "optimizer.gate_learning_rate=0.2"),
    ]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "nexus_cli", *map(str, flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=240,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "20 stored steps / (2 x 2) = 5 optimizer steps; 3 asked for" in done.stderr
    start = read_metrics(tmp_path / "two")[0]
    assert (start["event"], start["world_size"]) == ("start", 2)

    config = make_config(
        teacher={"store": str(teacher_store)},
        data={"sources": "nemotron-code"},
        batch_size=None,
        gradient_accumulation_steps=4,
        max_steps=3,
        optimizer={"learning_rate": 0.05, "gate_learning_rate": 0.2},
        output=tmp_path / "one",
    )
    train.run_offline(config, Workspace(tmp_path / "workspace"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(two) == 3
    assert two[-1]["kd"] > 0
    for mine, theirs in zip(two, one, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        for name in ("loss", "ce", "kd", "grad_norm", "gate_mean_abs"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7)


def test_samples_of_the_tail_need_a_store_that_has_them(offline, teacher_store):
    with pytest.raises(ConfigError, match="holds no samples of the tail"):
        offline(teacher={"store": str(teacher_store), "tail": "samples"})


def test_what_stands_for_the_tail_is_part_of_a_run(make_config, teacher_store):
    def settings_of(tail):
        config = make_config(teacher={"store": str(teacher_store), "tail": tail})
        return config.model_dump(mode="json", exclude=NOT_IDENTITY)

    assert settings_of("bucket") != settings_of("samples")
