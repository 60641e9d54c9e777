"""``nexus train`` and ``nexus train-offline`` as a user types them."""

from __future__ import annotations

from importlib import import_module

import pytest
import typer
from typer.testing import CliRunner


@pytest.mark.parametrize(
    "other", ["--train-router", "--train-router-bias", "--use-advanced-scheduler"]
)
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


@pytest.mark.parametrize(
    ("command", "runs"), [("train", "run_online"), ("train_offline", "run_offline")]
)
def test_flags_reach_the_settings_that_they_name(command, runs, monkeypatch):
    configs = []
    monkeypatch.setattr(
        f"nexus_cli.pipeline.train.{runs}", lambda config, *_, **__: configs.append(config)
    )
    app = typer.Typer()
    app.command()(getattr(import_module(f"nexus_cli.cli.commands.{command}"), command))
    flags = ["--seed", "7", "--eval-every", "11", "--save-every", "13", "--keep-last", "2"]
    done = CliRunner().invoke(app, [*flags, "--resume", "never"])
    assert done.exit_code == 0, done.output
    (config,) = configs
    assert (config.data.seed, config.evaluation.every) == (7, 11)
    runtime = config.runtime
    assert (runtime.save_every, runtime.keep_last, runtime.resume) == (13, 2, "never")
