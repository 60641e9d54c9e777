"""``nexus plot --schedule`` as a user types it."""

from __future__ import annotations

import pytest


def test_a_schedule_takes_what_training_takes_and_needs_no_model(nexus, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "train:\n  max_steps: 99\n  optimizer: {learning_rate: 0.25}\nplot: {output: pictures}\n"
    )
    done = nexus(
        *("plot", "--schedule", "--config", "run.yaml", "--max-steps", "50"),
        *("--use-advanced-scheduler", "--set", "train.optimizer.gate_learning_rate=0.75"),
        *("--set", "schedule.temperature=3"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "│ 25 " in line)
    assert "0.25" in row
    assert "0.75" in row
    assert (tmp_path / "pictures" / "schedule.png").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "pictures"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--max-steps", "5"], "--max-steps is of --schedule"),
        (["--use-advanced-scheduler"], "--use-advanced-scheduler is of --schedule"),
        (["--schedule", "--log-file", "x"], "--log-file says nothing"),
        (["--schedule", "--set", "no_such_key=1"], "train.no_such_key"),
    ],
)
def test_flags_that_do_not_go_together_are_a_usage_error(nexus, tmp_path, args, words):
    done = nexus("plot", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())
