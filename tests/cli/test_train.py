"""``nexus train`` and ``nexus train-offline`` as a user types them."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("other", ["--train-router", "--use-advanced-scheduler"])
@pytest.mark.parametrize("command", ["train", "train-offline"])
def test_freezing_and_training_the_router_is_a_usage_error(nexus, tmp_path, command, other):
    done = nexus(command, "--freeze-router", other, cwd=tmp_path)
    assert done.returncode == 2
    assert f"--freeze-router contradicts {other}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_spec_line_runs_with_other_devices_and_ends_at_its_checkpoint(
    nexus, tiny_model_dir, tiny_converted_dir, tmp_path
):
    done = nexus(
        *("train", "--teacher-model", tiny_model_dir, "--student-model", tiny_converted_dir),
        *("--teacher-device", "cpu", "--student-device", "cpu", "--freeze-router"),
        *("--max-steps", "2", "--output-dir", "outputs/trained"),
        *("--data", "bundled-general", "--batch-size", "1", "--set", "data.seq_len=64"),
        *("--set", "evaluation.every=null"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "outputs/trained/checkpoint-2: trained for 2 steps\n"
    assert (tmp_path / "outputs" / "trained" / "training.log").stat().st_size > 0
