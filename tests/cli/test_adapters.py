"""``--adapter`` and ``--base`` as a user types them."""

from __future__ import annotations

import json
import shutil

SHORT = (
    *("--data", "bundled-general", "--batch-size", "1", "--device", "cpu", "--max-steps", "2"),
    *("--set", "data.seq_len=64", "--set", "evaluation.every=null"),
)


def test_an_adapter_is_trained_moved_and_used_with_a_base_of_another_place(
    nexus, tiny_model_dir, tiny_converted_dir, tmp_path
):
    run = nexus(
        *("train", "--student-model", tiny_converted_dir, "--adapter", "--output-dir", "run"),
        *SHORT,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "run/checkpoint-2: trained for 2 steps\n"
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "run" / "checkpoint-2", moved)
    (moved / "local_base.json").write_text('{"path": "/of/another/machine"}')
    lost = nexus("convert", "--input", "moved", "--output", "whole", cwd=tmp_path)
    assert lost.returncode == 2
    assert "error: the base of moved is not at /of/another/machine" in lost.stderr
    assert "hint: give its folder with --base" in lost.stderr
    assert not (tmp_path / "whole").exists()
    base = ("--base", tiny_model_dir)
    for args in (
        ("convert", "--input", "moved", "--output", "whole", *base),
        ("convert", "--input", "whole", "--adapter", "--output", "again"),
        ("train", "--student-model", "moved", "--output-dir", "further", *base, *SHORT),
        ("validate", "--model", "moved", "--set", "compute_perplexity=false", *base),
    ):
        done = nexus(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (
        moved / "adapter.safetensors"
    ).read_bytes()
    report = json.loads((tmp_path / "runs/default/validate/report.json").read_text())
    assert all(check["passed"] for check in report["checks"])


def test_a_wrong_base_exits_with_4_and_writes_nothing(
    nexus, make_tiny_model, tiny_converted_dir, tmp_path
):
    made = nexus(
        *("convert", "--input", tiny_converted_dir, "--adapter", "--output", "small"), cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    make_tiny_model(tmp_path / "other", seed=5)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = nexus(
        *("convert", "--input", "small", "--base", "other", "--output", "whole"), cwd=tmp_path
    )
    assert done.returncode == 4
    assert "is not the model that small was made from" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
