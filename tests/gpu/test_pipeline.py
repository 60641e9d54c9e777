"""Every stage on a CUDA device, on the embedded model, as a user would run it."""

import json

import pytest
import torch

from nexus_cli import embedded
from nexus_cli.core.model.gpt_oss.loading import load_model

pytestmark = pytest.mark.gpu

TEXT = ["--data", "bundled-tool-calling:0.6,bundled-general:0.4"]
SHORT = ["--set", "data.seq_len=256"]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workspace(nexus, tmp_path_factory):
    """Collected, chosen and converted on the device."""
    root = tmp_path_factory.mktemp("gpu") / "run"
    for command in [
        ["collect", *TEXT, "--target-tokens", "20000", "--set", "runtime.device=cuda"],
        ["pca", "--top-k", "8", "--no-plots"],
        ["convert"],
    ]:
        done = nexus(*command, "-w", root)
        assert done.returncode == 0, done.stderr
    return root


@torch.no_grad()
def test_bfloat16_on_the_device_is_as_near_to_float32_as_on_the_cpu():
    ids = torch.randint(0, 8000, (2, 64), generator=torch.Generator().manual_seed(0))
    truth = load_model(embedded.MODEL_DIR, dtype=torch.float32)(input_ids=ids).logits
    on_cpu = load_model(embedded.MODEL_DIR, dtype=torch.bfloat16)(input_ids=ids).logits
    model = load_model(embedded.MODEL_DIR, device="cuda", dtype=torch.bfloat16)
    ours = model(input_ids=ids.cuda()).logits.cpu()
    assert (ours.float() - truth).norm() < 1.3 * (on_cpu.float() - truth).norm()


@pytest.mark.parametrize(
    "teacher",
    [[], ["--teacher-model", "embedded", "--teacher-device", "cuda:0"]],
    ids=["self", "model"],
)
def test_training_learns_the_domain(nexus, workspace, tmp_path, teacher):
    out = tmp_path / "train"
    done = nexus(
        "train", *teacher, *TEXT, *SHORT, "-w", workspace, "--device", "cuda:0",
        "--max-steps", "30", "--batch-size", "16", "--learning-rate", "0.002",
        "--set", "optimizer.gate_learning_rate=0.02", "--set", "evaluation.every=30",
        "--output-dir", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start = records(out)[0]
    assert (start["device"], start["dtype"]) == ("cuda:0", "bfloat16")
    losses = [r["eval"]["bundled-tool-calling"]["loss"] for r in records(out) if r.get("eval")]
    assert losses[-1] < 0.8 * losses[0]


def test_a_store_made_on_the_device_trains_and_the_result_is_judged(nexus, workspace, tmp_path):
    store, out = tmp_path / "store", tmp_path / "offline"
    for command in [
        ["precompute", *TEXT, "--teacher-model", "embedded", "--num-steps", "10",
         "--batch-size", "8", "--seq-len", "512", "--output-dir", store],
        ["train-offline", "--precomputed-teacher", store, "--device", "cuda:0",
         "--output-dir", out],
        ["validate", "--model", out, "--data", "bundled-tool-calling", "--general-data",
         "bundled-general", "--set", "window=512", "--set", "max_documents=40"],
    ]:  # fmt: skip
        done = nexus(*command, "-w", workspace)
        assert done.returncode == 0, done.stderr
    report = json.loads((workspace / "validate" / "report.json").read_text())
    assert report["summary"]["domain_perplexity"]["model"] > 0
    assert all(check["passed"] for check in report["checks"])


@pytest.mark.parametrize("backend", ["auto", "dequant"])
def test_two_deterministic_runs_write_the_same_bytes(nexus, workspace, tmp_path, backend):
    written = []
    for name in ("one", "two"):
        out = tmp_path / name
        done = nexus(
            "train", *TEXT, *SHORT, "-w", workspace, "--device", "cuda:0", "--deterministic",
            "--experts-backend", backend, "--max-steps", "6", "--batch-size", "8",
            "--set", "evaluation.every=3", "--output-dir", out,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        state = out / "checkpoint-6" / "training_state"
        written.append({f.name: f.read_bytes() for f in state.glob("*.safetensors")})
    assert written[0]
    assert written[0] == written[1]


def test_a_run_says_how_it_spends_the_memory(nexus, workspace, tmp_path):
    done = nexus(
        "train", *TEXT, *SHORT, "-w", workspace, "--device", "cuda:0", "--max-steps", "1",
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "activations kept, of" in done.stderr
    assert "experts: fused" in done.stderr


def test_a_device_that_is_not_there_is_said_at_once(nexus, workspace):
    done = nexus("train", *TEXT, "-w", workspace, "--device", "cuda:99")
    assert done.returncode == 5
    assert "cuda:99" in done.stderr
