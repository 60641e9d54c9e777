"""The command lines of the README's table, run as they stand but for paths, sizes and devices."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
DATA = "bundled-general"
READS_TEXT = {"collect", "train", "precompute", "validate"}
SIZES = {
    "--target-tokens": "2000",
    "--max-candidates": "60",
    "--max-steps": "2",
    "--num-steps": "16",
    "--batch-size": "1",
    "--seq-len": "128",
    "--gradient-accumulation-steps": "8",
    "--teacher-device": "cpu",
    "--student-device": "cpu",
}


def commands() -> list[str]:
    after = README.read_text().partition("## From the original's scripts")[2]
    section = after.partition("\n## ")[0]
    return re.findall(r"^\| [^|]+ \| `([^`]+)` \|$", section, re.MULTILINE)


def substituted(line: str) -> list[str]:
    """The line on the embedded model, with small sizes and two CPU ranks for two GPUs."""
    line = line.replace("/path/to/gpt-oss-120b-nexus", "nexus-model")
    line = line.replace("/path/to/gpt-oss-120b", "embedded")
    line = line.replace("checkpoint-1000", "checkpoint-2")
    words = shlex.split(line)
    for index, word in enumerate(words[:-1]):
        words[index + 1] = SIZES.get(word, words[index + 1])
    launcher = ["accelerate", "launch", "--num_processes=2", "-m", "nexus_cli"]
    two = words[: len(launcher)] == launcher
    words = words[len(launcher) :] if two else words[1:]
    if words[0] in READS_TEXT:
        words += ["--data", DATA]
    if words[0] == "collect":
        words += ["--set", "runtime.batch_size=4", "--set", "max_seq_length=128"]
    if words[0] == "train":
        words += ["--batch-size", "1", "--set", "data.seq_len=128"]
        words += ["--set", "evaluation.sequences=2"]
    if words[0] == "validate":
        words += ["--general-data", "bundled-general", "--set", "max_documents=4"]
        words += ["--set", "window=256", "--set", "stride=128"]
    python = [sys.executable, "-m"]
    if two:
        # accelerate would start one process without a GPU; torchrun starts two anywhere
        python += ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    return [*python, "nexus_cli", *words]


def test_the_table_has_every_command():
    named = {substituted(line)[substituted(line).index("nexus_cli") + 1] for line in commands()}
    assert named == {
        "collect", "pca", "convert", "train", "precompute", "train-offline", "validate", "plot",
    }  # fmt: skip


@pytest.mark.slow
def test_every_line_of_the_table_runs(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "COLUMNS": "160"}
    for line in commands():
        words = substituted(line)
        done = subprocess.run(
            words, cwd=tmp_path, env=env, input="/quit\n", capture_output=True, text=True
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    for path in [
        "data/router_probs.npz",
        "data/pca_stats.json",
        "data/pca_plots",
        "nexus-model/config.json",
        "outputs/trained/checkpoint-2/config.json",
        "outputs/trained/metrics.jsonl",
        "outputs/trained/training.log",
        "teacher_outputs",
        "teacher_outputs_2",
        "outputs/trained-offline/metrics.jsonl",
        "plots/report.html",
    ]:
        assert (tmp_path / path).exists(), path
    start = (tmp_path / "outputs/trained-offline/metrics.jsonl").read_text().splitlines()[0]
    assert '"world_size": 2' in start
