"""A conversion that is killed, or whose disk fills up, leaves nothing that loads."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.model.gpt_oss.export import NEXUS_SHARD
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.errors import NexusError
from nexus_cli.io import model_dir
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert

# The process kills itself when the function named by the first argument is called the nth time.
KILLED = """
import importlib, os, signal, sys
from nexus_cli.cli.app import main
place, count, *command = sys.argv[1:]
module, _, name = place.rpartition(".")
module = importlib.import_module(module)
real, calls = getattr(module, name), []

def killed(*args, **kwargs):
    calls.append(name)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(module, name, killed)
sys.argv = ["nexus", *command]
main()
"""
CORE = "nexus_cli.core.model.gpt_oss"


def command(model, out, workspace):
    return [
        *("convert", "--input", str(model), "--output", str(out), "-w", str(workspace)),
        *("--init-strategy", "random"),
    ]


@pytest.mark.parametrize(
    ("place", "count"),
    [
        (f"{CORE}.initialise.random_expert", 2),  # the first layer is written
        (f"{CORE}.export._write_config", 1),
        ("nexus_cli.io.atomic._replace_directory", 1),
        ("nexus_cli.io.manifest.describe", 1),
    ],
)
def test_a_killed_conversion_leaves_nothing_that_loads(tiny_model_dir, tmp_path, place, count):
    out = tmp_path / "out"
    arguments = command(tiny_model_dir, out, tmp_path / "w")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, place, str(count), *arguments], capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    if place.startswith(CORE):
        # Neither the output nor what the kill left beside it is a model.
        assert not any(map(model_dir.is_model, tmp_path.glob("*out*")))
    if place != "nexus_cli.io.manifest.describe":  # by then the folder is whole
        assert not out.exists()
        with pytest.raises(NexusError):
            load_model(out)
    again = ConvertConfig(model=str(tiny_model_dir), init_strategy="random", output=out)
    convert.run(again, Workspace(tmp_path / "w"))
    load_model(out)
    assert {path.name for path in tmp_path.iterdir()} == {
        "out",
        "out.manifest.json",
        ".out.lock",
    }
    for shard in tiny_model_dir.glob("model-*.safetensors"):
        assert (out / shard.name).samefile(shard)


def test_a_kill_while_a_model_is_replaced_leaves_the_old_one(tiny_model_dir, tmp_path):
    out = tmp_path / "out"
    first = ConvertConfig(model=str(tiny_model_dir), init_strategy="random", seed=1, output=out)
    convert.run(first, Workspace(tmp_path / "w"))
    before = (out / NEXUS_SHARD).read_bytes()
    arguments = [*command(tiny_model_dir, out, tmp_path / "w"), "--force"]
    place = f"{CORE}.initialise.random_expert"
    done = subprocess.run([sys.executable, "-c", KILLED, place, "2", *arguments])
    assert done.returncode == -signal.SIGKILL
    assert (out / NEXUS_SHARD).read_bytes() == before
    load_model(out)


def test_a_disk_that_fills_up_in_the_middle_is_one_clear_line(tiny_model_dir, tmp_path):
    """The system refuses to let a file grow, as a full disk does: the shard is cut short."""
    out = tmp_path / "out"
    shard_bytes = 2 * (3 * 64 * 32 + 2 * 32 + 64) * 2 + 2 * 4
    # Coverage could not write its own file either, and would say so.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(
        [sys.executable, "-m", "nexus_cli", *command(tiny_model_dir, out, tmp_path / "w")],
        capture_output=True,
        text=True,
        env=env | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (shard_bytes // 2,) * 2),
    )
    assert done.returncode == 5, done.stderr
    assert f"cannot write {out}: File too large" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {".out.lock", "w"}


def test_the_original_is_never_written_to(tiny_model_dir, tmp_path):
    def state():
        return {
            path.name: (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns)
            for path in tiny_model_dir.iterdir()
        }

    before = state()
    for copy in (False, True):
        config = ConvertConfig(
            model=str(tiny_model_dir),
            init_strategy="random",
            output=tmp_path / f"copy-{copy}",
            copy_shards=copy,
        )
        convert.run(config, Workspace(tmp_path / "w"))
    assert state() == before


def test_the_metadata_says_what_the_model_was_made_from(tiny_model_dir, tmp_path):
    usage = [[4.0, 1, 1, 1, 1, 0, 0, 0], [0.5] * 8]
    stats = {
        "format": "nexus.pca_stats/1",
        "model_fingerprint": model_dir.fingerprint(tiny_model_dir),
        "method": "diverse",
        "tokens": 1000,
        "num_layers": 2,
        "num_experts": 8,
        "top_k": 2,
        "layers": {
            f"layer_{i}": {"top_expert_indices": [0, 5], "usage": usage[i]} for i in range(2)
        },
    }
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    config = ConvertConfig(
        model=str(tiny_model_dir),
        init_strategy="pca_topK",
        pca_stats=tmp_path / "stats.json",
        output=tmp_path / "out",
    )
    convert.run(config, Workspace(tmp_path / "w"))
    record = json.loads((tmp_path / "out" / "conversion_metadata.json").read_text())
    assert record["base"]["path"] == str(tiny_model_dir.resolve())
    assert record["init_strategy"] == "pca_topK"
    assert record["experts"] == [[[0, 0], [0, 5]], [[1, 0], [1, 5]]]
    statistics = record["router_statistics"]
    assert (statistics["method"], statistics["tokens"], statistics["top_k"]) == ("diverse", 1000, 2)
    assert statistics["usage_of_experts"] == {"mean": 0.375, "least": 0.25, "most": 0.5}
    assert record["quantization"]["base"]["quant_method"] == "mxfp4"
    assert record["architecture"]["hidden_size"] == 64
    assert record["validation"]["equals_base_at_start"]
    assert record["environment"]["nexus-cli"]
    assert record["converted"]
    held = load_file(tmp_path / "out" / NEXUS_SHARD)
    assert record["shared_parameters"] == sum(tensor.numel() for tensor in held.values())
