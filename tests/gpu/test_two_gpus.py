"""Two CUDA devices: two ranks, and a teacher on the one with a student on the other."""

import json
import os
import subprocess
import sys

import pytest
import torch

from nexus_cli import embedded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

TEXT = ["--data", "bundled-tool-calling:0.6,bundled-general:0.4"]
TRAIN = [
    *("train", *TEXT, "--set", "data.seq_len=256", "--max-steps", "5", "--batch-size", "4"),
    *("--learning-rate", "0.002", "--set", "optimizer.gate_learning_rate=0.02"),
]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def workspace(nexus, tmp_path_factory):
    root = tmp_path_factory.mktemp("two") / "run"
    done = nexus("convert", "--input", embedded.MODEL_DIR, "--init-strategy", "random", "-w", root)
    assert done.returncode == 0, done.stderr
    return root


def steps(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def on_two_ranks(*command):
    done = subprocess.run(
        [sys.executable, *LAUNCHER, "-m", "nexus_cli", *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        timeout=240,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_two_ranks_take_the_steps_of_one_with_accumulation(nexus, workspace, tmp_path, optimizer):
    """In bf16 but for the masters: the same micro-batches, summed in another order."""
    two, one = tmp_path / "two", tmp_path / "one"
    flags = [*TRAIN, "-w", workspace, "--optimizer", optimizer]
    on_two_ranks(*flags, "--output-dir", two)
    done = nexus(*flags, "--device", "cuda:0", "--gradient-accumulation-steps", "2",
                 "--output-dir", one)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(steps(two)) == 5
    for mine, theirs in zip(steps(two), steps(one), strict=True):
        assert mine["tokens"] == theirs["tokens"]
        for name in ("loss", "ce"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3), name
    assert steps(two)[-1]["kd"] > 1e-4
    assert steps(two)[-1]["kd"] == pytest.approx(steps(one)[-1]["kd"], rel=0.1)


@pytest.mark.parametrize(
    "devices",
    [
        ["--teacher-device", "cuda:0", "--student-device", "cuda:1"],
        ["--teacher-device", "cuda:1", "--student-device", "cuda:0"],
    ],
)
def test_a_teacher_on_the_other_device_changes_no_bit(nexus, workspace, tmp_path, devices):
    flags = [*TRAIN, "-w", workspace, "--teacher-model", "embedded"]
    for name, where in (
        ("apart", devices),
        ("together", ["--teacher-device", "cuda:0", "--student-device", "cuda:0"]),
    ):
        done = nexus(*flags, *where, "--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    apart, together = steps(tmp_path / "apart"), steps(tmp_path / "together")
    assert [record["loss"] for record in apart] == [record["loss"] for record in together]
    assert apart[-1]["kd"] > 1e-4


def test_training_on_the_second_device_equals_the_first(nexus, workspace, tmp_path):
    for device in ("cuda:0", "cuda:1"):
        done = nexus(*TRAIN, "-w", workspace, "--device", device, "--output-dir", tmp_path / device)
        assert done.returncode == 0, done.stderr
    first, second = steps(tmp_path / "cuda:0"), steps(tmp_path / "cuda:1")
    assert [record["loss"] for record in first] == [record["loss"] for record in second]


def test_two_ranks_collect_and_precompute(nexus, workspace, tmp_path):
    on_two_ranks("collect", *TEXT, "--target-tokens", "20000", "-w", tmp_path / "run",
                 "--model", "embedded")  # fmt: skip
    store = tmp_path / "store"
    on_two_ranks("precompute", *TEXT, "--teacher-model", "embedded", "--num-steps", "6",
                 "--batch-size", "4", "--seq-len", "256", "--output-dir", store,
                 "-w", workspace)  # fmt: skip
    done = nexus("train-offline", "--precomputed-teacher", store, "--device", "cuda:1",
                 "-w", workspace, "--output-dir", tmp_path / "offline")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(record["kd"] < 1.0 for record in steps(tmp_path / "offline"))
