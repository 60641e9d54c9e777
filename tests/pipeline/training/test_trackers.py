"""Metrics that also go to a tracker."""

import sys
import types

import pytest

from nexus_cli.errors import ConfigError
from nexus_cli.io.metrics import read_metrics
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import train
from nexus_cli.pipeline.training import assemble
from nexus_cli.pipeline.training.trackers import flat_numbers, flat_settings

pytest.importorskip("tensorboard")


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(run):
    out = run(evaluation={"every": 5, "sequences": 4}, runtime={"report_to": "tensorboard"})
    told = scalars(out / "tensorboard" / "run")
    steps = [record for record in read_metrics(out) if "loss" in record]
    assert [step for step, _ in told["loss"]] == list(range(1, 11))
    for name in ("loss", "ce", "grad_norm", "learning_rate"):
        assert [value for _, value in told[name]] == pytest.approx(
            [record[name] for record in steps], rel=1e-5
        )
    (name,) = (tag for tag in told if tag.startswith("eval/") and tag.endswith("domain.jsonl/kd"))
    assert [step for step, _ in told[name]] == [0, 5, 10]


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_loaded(run, monkeypatch):
    from nexus_cli.pipeline.training import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="package wandb is not installed"):
        run(student="/nowhere", runtime={"report_to": "wandb"})


class UsageError(Exception):
    """As wandb's own."""


@pytest.fixture
def wandb(monkeypatch):
    """A client in place of the real one, which needs an account; offline, so nothing is asked."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    fake.login, fake.config = lambda: False, types.SimpleNamespace(update=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def refuse(**_):
    raise UsageError("api_key not configured (no-tty).\n  call wandb.login(key=[your_api_key])")


REFUSED = (
    r"--report-to wandb: api_key not configured \(no-tty\)\. "
    r"call wandb\.login\(key=\[your_api_key\]\)"
)


@pytest.mark.parametrize("dry_run", [True, False])
def test_wandb_without_a_login_is_said_in_one_line_before_anything_is_loaded(
    make_config, wandb, tmp_path, dry_run
):
    wandb.login = refuse
    config = make_config(
        student="/nowhere", runtime={"report_to": "wandb"}, output=tmp_path / "run"
    )
    with pytest.raises(ConfigError, match=REFUSED) as caught:
        train.run_online(config, Workspace(tmp_path), dry_run=dry_run)
    assert "run: wandb login" in caught.value.hint
    assert "WANDB_MODE=offline" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_said_before_the_models_are_loaded(
    run, wandb, monkeypatch
):
    def load(*_):
        raise AssertionError("loaded")

    wandb.init = refuse
    monkeypatch.setattr(assemble, "load_models", load)
    with pytest.raises(ConfigError, match=REFUSED):
        run(runtime={"report_to": "wandb"})


def test_trackers_are_closed_where_a_later_one_does_not_start(run, wandb, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    closed, honest = [], TensorBoardTracker.finish
    wandb.init = refuse
    monkeypatch.setattr(
        TensorBoardTracker, "finish", lambda tracker: (closed.append(1), honest(tracker))
    )
    with pytest.raises(ConfigError, match=REFUSED):
        run(runtime={"report_to": "tensorboard,wandb"})
    assert closed == [1]


def test_wandb_is_started_told_and_finished(run, wandb):
    """Accelerate's side of it is the real one."""
    seen = {"logged": {}, "finished": 0}

    def finish():
        seen["finished"] += 1

    def init(**arguments):
        seen["init"] = arguments
        log = lambda values, step: seen["logged"].update({step: values})  # noqa: E731
        return types.SimpleNamespace(log=log, finish=finish)

    wandb.init = init
    out = run(runtime={"report_to": "wandb"})
    assert seen["init"] == {"project": "nexus", "name": "run", "dir": str(out)}
    losses = {record["step"]: record["loss"] for record in read_metrics(out) if "loss" in record}
    assert {step: values["loss"] for step, values in seen["logged"].items()} == losses
    assert seen["finished"] == 1


def test_names_are_checked_and_split_at_commas(make_config):
    both = make_config(runtime={"report_to": "tensorboard,wandb"})
    assert both.runtime.report_to == ("tensorboard", "wandb")
    with pytest.raises(ValueError, match="report_to"):
        make_config(runtime={"report_to": "comet"})


def test_numbers_are_flattened_and_all_else_is_left_out():
    record = {"step": 3, "loss": 1.5, "clipped": True, "sources": {"a": {"ce": 2}}, "note": "x",
              "layers": [1, 2]}  # fmt: skip
    assert flat_numbers(record) == {"step": 3, "loss": 1.5, "sources/a/ce": 2}
    assert flat_settings({"a": {"b": None, "c": [1]}, "d": True}) == {
        "a.b": "None", "a.c": "[1]", "d": True,
    }  # fmt: skip
