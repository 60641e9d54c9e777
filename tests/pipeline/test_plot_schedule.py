"""``nexus plot --schedule``: what is drawn is what a run will do, and needs no run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nexus_cli.config.plot import PlotConfig
from nexus_cli.config.train import TrainConfig
from nexus_cli.core.train.loop import scaled_rates
from nexus_cli.errors import ConfigError
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import plot_schedule
from nexus_cli.pipeline.training.optimizer import peak_rates
from nexus_cli.pipeline.training.request import make_schedule

ADVANCED = {"schedule": {"advanced": True}, "max_steps": 40}


def test_every_step_has_the_values_that_the_loop_asks_for():
    training = TrainConfig(**ADVANCED)
    timeline = plot_schedule.plan(training)
    schedule, peak = make_schedule(training.schedule, 40), peak_rates(training.optimizer)
    for step in range(40):
        values = schedule.at(step)
        rates = scaled_rates(peak, values)
        assert timeline.rates["shared experts"][step] == rates.shared
        assert timeline.rates["gates"][step] == rates.gate
        assert timeline.rates["routers"][step] == rates.router
        assert timeline.rates["router biases"][step] == rates.router_bias
        assert timeline.temperature_N[step] == values.temperature
        kl = {label: values_N[step] for label, values_N in timeline.kl.items()}
        assert kl == {
            "nemotron-general": values.kd_scale,
            "nemotron-code and 2 more": 0.1 * values.kd_scale,
        }
    assert timeline.steps_N.tolist() == list(range(1, 41))


def test_stages_meet_and_the_freeze_is_the_last_step_that_moves_biases():
    timeline = plot_schedule.plan(TrainConfig(**ADVANCED))
    assert timeline.stages == [("warmup", 1, 20), ("stable", 21, 28), ("decay", 29, 40)]
    assert timeline.frozen_after == 20
    biases_N = timeline.rates["router biases"]
    assert np.all(biases_N[:20] > 0)
    assert np.all(biases_N[20:] == 0)
    assert timeline.turns == [1, 20, 21, 28, 29, 40]


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, ["shared experts", "gates"]),
        ({"train_router_bias": True}, ["shared experts", "gates", "router biases"]),
        ({"train_router": True}, ["shared experts", "gates", "routers", "router biases"]),
    ],
)
def test_what_does_not_train_has_no_rate(changes, groups):
    assert list(plot_schedule.plan(TrainConfig(**changes)).rates) == groups


def test_biases_that_never_freeze_have_no_mark():
    never = {"train_router": True, "schedule": {"router_bias_freeze_ratio": 1.0}}
    assert plot_schedule.plan(TrainConfig(**never)).frozen_after is None
    frozen = {"schedule": {"router_bias_freeze_ratio": 0.5}}  # and the router does not train
    assert plot_schedule.plan(TrainConfig(**frozen)).frozen_after is None


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 1},
        {"max_steps": 3000, "schedule": {"decay": "wsd"}},
        {"schedule": {"decay": "constant", "kd_warmup_ratio": 0.2}},
        {"train_router": True, "schedule": {"router_bias_multiplier": 0.0}},
        {**ADVANCED, "optimizer": {"gate_learning_rate": 2e-4, "router_learning_rate": 2e-4}},
    ],
)
def test_any_schedule_becomes_a_picture(tmp_path: Path, changes):
    config = PlotConfig(output=tmp_path / "new" / "plots")
    plot_schedule.run(config, TrainConfig(**changes), Workspace(tmp_path / "ws"))
    assert {path.name for path in config.output.iterdir()} == {"schedule.png", "schedule.svg"}
    assert not (tmp_path / "ws").exists()


def test_the_turning_points_are_printed_and_the_picture_is_named(tmp_path, capsys):
    workspace = Workspace(tmp_path)
    plot_schedule.run(PlotConfig(), TrainConfig(**ADVANCED), workspace)
    said = capsys.readouterr()
    assert str(workspace.stage_dir("plot") / "schedule.png") in said.out
    row = next(line for line in said.out.splitlines() if "│ 20 " in line)
    for text in ("warm-up", "0.0002", "0.005", "1e-05", "1e-08", "1 / 0.1"):
        assert text in row
    assert "--max-steps" not in said.err
    plot_schedule.run(PlotConfig(), TrainConfig(), workspace)
    assert "drawn for 1,000 steps" in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_prints_and_draws_nothing(tmp_path, capsys):
    plot_schedule.run(PlotConfig(), TrainConfig(), Workspace(tmp_path), dry_run=True)
    assert "decay" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_schedule_that_cannot_be_is_one_line(tmp_path):
    impossible = TrainConfig(schedule={"warmup_ratio": 0.8, "stable_ratio": 0.8})
    with pytest.raises(ConfigError, match=r"train\.schedule"):
        plot_schedule.run(PlotConfig(), impossible, Workspace(tmp_path))
    assert not list(tmp_path.iterdir())
