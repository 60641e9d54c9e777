"""Small runs: the tiny student, a few kilobytes of text, and a teacher store of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.config.train import TrainConfig
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.metrics import read_metrics
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import precompute, train

SEQ_LEN = 32


@pytest.fixture(scope="session")
def training_text(tmp_path_factory):
    """Two sources of plain text: one to learn, one to hold on to."""
    folder = tmp_path_factory.mktemp("training-text")
    for seed, name in enumerate(("domain", "replay")):
        generator = np.random.default_rng(seed)
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(40):
                words = [f"{'abcdefgh'[i % 8]}{i}" for i in generator.integers(300, size=40)]
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return folder


@pytest.fixture(scope="session")
def text_data(training_text):
    """The mixture, as a config takes it."""
    return {
        "sources": [
            {"name": str(training_text / "domain.jsonl"), "weight": 0.7},
            {
                "name": str(training_text / "replay.jsonl"),
                "weight": 0.3,
                "loss": {"ce": 0.0, "kd": 1.0},
            },
        ],
        "seq_len": SEQ_LEN,
        "held_out": 0.2,
    }


@pytest.fixture(scope="session")
def make_config(tiny_converted_dir, text_data):
    """Settings of a run of ten steps; nested changes are merged."""

    def make(**changes):
        values = {
            "student": str(tiny_converted_dir),
            "data": text_data,
            "max_steps": 10,
            "batch_size": 2,
            "optimizer": {"learning_rate": 1e-2, "gate_learning_rate": 1e-1},
            "evaluation": {"every": None},
            "runtime": {"device": "cpu", "save_every": 5},
        }
        for key, value in changes.items():
            both = isinstance(value, dict) and isinstance(values.get(key), dict)
            values[key] = values[key] | value if both else value
        return TrainConfig(**values)

    return make


@pytest.fixture(scope="session")
def make_store(tiny_model_dir, text_data, tmp_path_factory):
    """Stores of the mixture, two sequences a step."""

    def make(**settings):
        root = tmp_path_factory.mktemp("store")
        config = PrecomputeConfig(
            model=str(tiny_model_dir),
            data=text_data,
            batch_size=2,
            runtime={"device": "cpu"},
            output=root / "teacher",
            **settings,
        )
        precompute.run(config, Workspace(root / "workspace"))
        return root / "teacher"

    return make


@pytest.fixture(scope="session")
def teacher_store(make_store):
    """Twenty stored steps of two sequences, 64 tokens a position, kept in float32."""
    return make_store(num_steps=20, top_k=64, top_p=1.0, values="float32")


@pytest.fixture
def run(tmp_path, make_config):
    """Train into ``tmp_path / name`` and return that folder."""

    def start(name="run", *, force=False, offline=False, **changes):
        config = make_config(output=tmp_path / name, **changes)
        command = train.run_offline if offline else train.run_online
        command(config, Workspace(tmp_path / "workspace"), force=force)
        return tmp_path / name

    return start


@pytest.fixture
def losses():
    """What a run recorded, step by step, without what a clock measured."""

    def read(directory):
        timed = {"tokens_per_second", "memory_gib", "seconds"}
        return [
            {key: value for key, value in record.items() if key not in timed}
            for record in read_metrics(directory)
            if "loss" in record
        ]

    return read


@pytest.fixture
def trained_bytes():
    """Hashes of the files with what a checkpoint learned, and of its whole training state."""

    def read(checkpoint):
        files = [checkpoint / "nexus-trained.safetensors"]
        files += sorted((checkpoint / "training_state").glob("*.safetensors"))
        assert len(files) >= 4  # model shard, masters, moments, generators
        return {file.name: sha256_file(file) for file in files}

    return read
