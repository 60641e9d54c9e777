"""One run on one, two and four CPU ranks: the same steps, and nothing frozen is exchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nexus_cli.config.load import resolve
from nexus_cli.config.train import TrainConfig
from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distributed import World
from nexus_cli.core.train.ranks import wrap_for_ranks
from nexus_cli.core.train.step import StepScale
from nexus_cli.io.metrics import read_metrics
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import train
from nexus_cli.pipeline.training.assemble import load_models
from nexus_cli.pipeline.training.request import online_request

CPU = torch.device("cpu")
SEQUENCES = 4  # of a step, however it is split
TIMED = ("time", "seconds", "tokens_per_second", "memory_gib")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Questions of any length with answers of any length: sequences with few targets and many."""
    generator = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"

    def words(most):
        return " ".join(f"w{i}" for i in generator.integers(100, size=generator.integers(1, most)))

    rows = [{"prompt": words(25), "response": words(25)} for _ in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def settings(chats, training_text, tiny_converted_dir, tmp_path_factory):
    """A config file with all that ranks exchange: gradients, sums, router losses, averaging."""
    values = {
        "student": str(tiny_converted_dir),
        "train_router": True,
        "max_steps": 4,
        "batch_size": 1,
        "data": {
            "sources": [
                {"name": str(chats), "weight": 0.6},
                {"name": str(training_text / "replay.jsonl"), "weight": 0.4},
            ],
            "seq_len": 128,
            "held_out": 0.2,
        },
        "loss": {
            "domain": {"ce": 1.0, "kd": 0.3, "router": 0.1},
            "load_balance": 0.02,
            "router_z": 0.01,
        },
        "optimizer": {
            "learning_rate": 0.1,
            "gate_learning_rate": 0.3,
            "router_learning_rate": 1e-2,
        },
        "averaging": {"every": 2, "beta": 0.3},
        "evaluation": {"every": 2, "sequences": 6},
        "runtime": {"device": "cpu", "batch_size": 2, "save_every": None, "watch_every": 1},
    }
    file = tmp_path_factory.mktemp("settings") / "nexus.yaml"
    file.write_text(json.dumps({"train": values}))  # JSON is YAML
    return file


@pytest.fixture(scope="module")
def one_rank(settings, tmp_path_factory):
    """The records of the run of one process."""
    root = tmp_path_factory.mktemp("one")
    changes = {"gradient_accumulation_steps": SEQUENCES, "output": root / "run"}
    config = resolve(TrainConfig, "train", file=settings, **changes)
    train.run_online(config, Workspace(root / "workspace"))
    return read_metrics(root / "run")


def launch(ranks, settings, directory):
    """The records of the run of several processes."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", "-m", "nexus_cli", "train", "--config", settings),
        *("--gradient-accumulation-steps", SEQUENCES // ranks),
        *("--output-dir", directory / "run", "--workspace", directory / "workspace"),
    ]
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=240,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return read_metrics(directory / "run")


def numbers(record, prefix=""):
    """Every number of a record by its dotted name, without what a clock measured."""
    found = {}
    for key, value in record.items():
        if key in TIMED:
            continue
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found |= numbers({str(i): item for i, item in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def of_kind(records, key):
    return [record for record in records if key in record]


def assert_same(records, expected):
    assert len(records) == len(expected) > 0
    for mine, theirs in zip(map(numbers, records), map(numbers, expected), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            # A divergence is a small difference of large sums: its error is that of the sums.
            assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_the_steps_of_one_process(ranks, settings, one_rank, tmp_path):
    records = launch(ranks, settings, tmp_path)
    assert (one_rank[0]["event"], one_rank[0]["world_size"]) == ("start", 1)
    assert (records[0]["event"], records[0]["world_size"]) == ("start", ranks)

    steps = of_kind(one_rank, "loss")
    tokens = np.diff([0, *(step["tokens"] for step in steps)])
    assert len(set(tokens)) == len(steps) == 4  # ragged: no two steps count as many tokens
    assert all(step["load_balance"] > 0 and step["router_z"] > 0 for step in steps)
    assert steps[-1]["kd"] > 1e-3
    assert steps[-1]["router_kl"] > 0
    assert_same(of_kind(records, "loss"), steps)
    assert_same(of_kind(records, "eval"), of_kind(one_rank, "eval"))

    moves = [record for record in one_rank if record.get("event") == "sfa"]
    assert [move["step"] for move in moves] == [2, 4]
    assert all(move["l2"] > 0 for move in moves)
    assert_same([record for record in records if record.get("event") == "sfa"], moves)


@pytest.fixture
def group(tmp_path):
    """A group of this process alone: what DDP would send can be counted, and goes nowhere."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("asks", [{}, {"train_router": True}, {"train_router_bias": True}], ids=str)
def test_ranks_exchange_what_trains_and_nothing_else(make_config, tmp_path, monkeypatch, asks):
    sent, summed = [], []
    real = {"broadcast": dist._broadcast_coalesced, "sum": dist.all_reduce}

    def broadcast(group, tensors, *args):
        sent.extend(tensors)
        return real["broadcast"](group, tensors, *args)

    def add_up(tensor, *args, **options):
        summed.append((tensor.dtype, tensor.numel()))
        return real["sum"](tensor, *args, **options)

    monkeypatch.setattr(dist, "_broadcast_coalesced", broadcast)
    monkeypatch.setattr(dist, "all_reduce", add_up)
    request = online_request(make_config(**asks), Workspace(tmp_path), 1)
    models = load_models(request, World(0, 1, CPU), CPU)
    module = wrap_for_ranks(models.step, World(0, 2, CPU))
    ids = torch.arange(24)[None] * 7
    batch = Batch(
        input_ids_BS=ids,
        position_ids_BS=torch.arange(24)[None],
        loss_mask_BS=torch.ones_like(ids, dtype=torch.bool),
        source_B=torch.zeros(1, dtype=torch.int64),
        index_B=torch.zeros(1, dtype=torch.int64),
    )
    module(batch, models.teacher.signal(batch), StepScale(23, 1)).loss.backward()

    trained = sum(master.numel() for master in models.masters.values())
    packed = [p for p in models.step.parameters() if p.dtype == torch.uint8]
    assert len(packed) == 8  # blocks and scales of two products in two layers
    assert {t.data_ptr() for t in sent} == {m.data_ptr() for m in models.masters.values()}
    assert sum(tensor.numel() for tensor in sent) == trained
    assert {dtype for dtype, _ in summed} == {torch.float32}
    assert sum(count for _, count in summed) == trained
