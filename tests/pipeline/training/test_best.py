"""Evaluation in the loop: the best checkpoint stays, and a run that gets no better ends."""

import json
import shutil

import pytest

from nexus_cli.core.train.best import Best, BestKeeper, read_best
from nexus_cli.errors import ConfigError, WorkspaceError
from nexus_cli.io.metrics import read_metrics
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import train
from nexus_cli.pipeline.training import assemble, plan
from nexus_cli.pipeline.training.request import online_request


@pytest.fixture
def objectives(monkeypatch):
    """Lets evaluations find these objectives, by step, in every run of the test."""

    def let(values):
        real = assemble.make_evaluate

        def make(models, held_out, world):
            measure, number = real(models, held_out, world), iter(values)

            def evaluate():
                found = measure()
                wanted = next(number)
                return {
                    name: {**result, "loss": wanted, "kd": 0.0} for name, result in found.items()
                }

            return evaluate

        monkeypatch.setattr(assemble, "make_evaluate", make)

    return let


EVERY_TWO = {"every": 2, "sequences": 4}


def test_the_best_checkpoint_stays_beside_the_newest_without_its_state(run, objectives):
    objectives([5.0, 4.0, 3.0, 4.5, 4.5, 4.5])  # at steps 0, 2, 4, 6, 8, 10
    out = run(evaluation=EVERY_TWO, runtime={"keep_last": 2, "save_every": 2})
    kept = sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))
    assert kept == [4, 8, 10]
    assert read_best(out).step == 4
    assert not (out / "checkpoint-4" / "training_state").exists()
    assert read_metrics(out)[-1]["best_step"] == 4


def test_a_better_evaluation_saves_though_no_checkpoint_is_due(run, objectives):
    objectives([5.0, 4.0, 4.5, 4.5, 4.5, 4.5])
    out = run(evaluation=EVERY_TWO, runtime={"save_every": None})
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-10"}


def test_patience_ends_the_run_with_its_best_checkpoint_as_the_result(run, objectives, tmp_path):
    objectives([5.0, 4.0, 4.1, 4.2, 4.3])
    out = run(evaluation={**EVERY_TWO, "patience": 2}, runtime={"save_every": None})
    records = read_metrics(out)
    assert (records[-1]["step"], records[-1]["event"]) == (6, "finish")
    assert records[-1]["ended_early"] is True
    record = json.loads((tmp_path / "run.manifest.json").read_text())
    assert record["main"].endswith("checkpoint-2")
    before = (out / "metrics.jsonl").read_bytes()
    run(evaluation={**EVERY_TWO, "patience": 2}, runtime={"save_every": None})
    assert (out / "metrics.jsonl").read_bytes() == before  # finished: not run again


def test_an_evaluation_never_better_than_the_start_keeps_no_checkpoint(run, objectives):
    objectives([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    out = run(evaluation=EVERY_TWO, runtime={"save_every": None})
    assert read_best(out) == Best(0, pytest.approx(0.5))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-10"]


def test_the_record_of_an_evaluation_holds_its_objective(run):
    out = run(evaluation=EVERY_TWO)
    judged = [record for record in read_metrics(out) if "eval" in record]
    for record in judged:
        domain, replay = record["eval"].values()
        expected = (domain["loss"] + 0.1 * domain["kd"] + replay["kd"]) / 2
        assert record["held_out_objective"] == pytest.approx(expected)
    best = min(judged, key=lambda record: record["held_out_objective"])
    assert read_best(out) == Best(best["step"], pytest.approx(best["held_out_objective"]))


def test_starting_over_forgets_the_best_of_the_run_before(run, objectives):
    objectives([5.0, 1.0, 4.0, 4.0, 4.0, 4.0])
    out = run(evaluation=EVERY_TWO)
    assert read_best(out).step == 2
    run(force=True, evaluation={"every": None})
    assert read_best(out) is None


def test_patience_without_evaluations_is_refused(make_config):
    with pytest.raises((ConfigError, ValueError), match="patience needs evaluations"):
        make_config(evaluation={"every": None, "patience": 2})


def test_a_run_killed_before_the_best_is_written_down_goes_on_as_the_unbroken_one(
    run, objectives, monkeypatch
):
    values = [5.0, 4.0, 3.0, 3.5, 3.5, 3.5]
    objectives(values)
    whole = run("whole", evaluation=EVERY_TWO, runtime={"save_every": 2})

    class Killed(BaseException):
        pass

    def die(keeper):
        if keeper.best.step == 4:
            raise Killed
        honest(keeper)

    honest = BestKeeper.write
    monkeypatch.setattr(BestKeeper, "write", die)
    objectives(values)
    with pytest.raises(Killed):
        run("killed", evaluation=EVERY_TWO, runtime={"save_every": 2})
    monkeypatch.setattr(BestKeeper, "write", honest)
    objectives(values[3:])
    killed = run("killed", evaluation=EVERY_TWO, runtime={"save_every": 2})
    assert read_best(killed) == read_best(whole) == Best(4, pytest.approx(1.5))
    names = [sorted(path.name for path in out.glob("checkpoint-*")) for out in (whole, killed)]
    assert names[0] == names[1]


def test_a_run_killed_after_its_early_end_ends_there_again(run, objectives, monkeypatch):
    settings = {"evaluation": {**EVERY_TWO, "patience": 2}, "runtime": {"save_every": None}}

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    objectives([5.0, 4.0, 4.1, 4.2, 4.3, 4.4])
    honest = train._commit
    monkeypatch.setattr(train, "_commit", die)
    with pytest.raises(Killed):
        run(**settings)
    monkeypatch.setattr(train, "_commit", honest)
    out = run(**settings)
    assert read_metrics(out)[-1]["step"] == 6
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}


def test_a_folder_with_checkpoints_of_another_run_is_not_gone_on_into(run):
    source = run("source", runtime={"save_every": 8})
    other = run("other", max_steps=2, runtime={"save_every": 2})
    other.with_name("other.manifest.json").unlink()  # as if it were not finished
    changes = {"max_steps": 10, "runtime": {"resume": str(source / "checkpoint-8")}}
    with pytest.raises(
        WorkspaceError, match="holds checkpoints of another run, the last at step 2"
    ):
        run("other", **changes)


def test_with_patience_the_result_says_that_nothing_was_better_than_the_start(
    run, objectives, tmp_path, capsys
):
    objectives([1.0, 2.0, 3.0])
    out = run(evaluation={**EVERY_TWO, "patience": 2})
    why = "no evaluation was better than the start"
    shown = capsys.readouterr().out
    assert f"checkpoint-4: trained for 4 steps, the last; {why}" in shown
    log = (out / "training.log").read_text()
    assert f"WARNING {why}: the result is the last checkpoint, at step 4" in log
    record = json.loads((tmp_path / "run.manifest.json").read_text())
    assert record["main"].endswith("checkpoint-4")


def test_a_best_checkpoint_that_somebody_deleted_is_missed_by_name(
    run, objectives, monkeypatch, tmp_path, capsys
):
    objectives([5.0, 4.0, 4.1, 4.2])
    honest = train._commit

    def commit(out, *rest):
        shutil.rmtree(out.directory / "checkpoint-2")
        honest(out, *rest)

    monkeypatch.setattr(train, "_commit", commit)
    out = run(evaluation={**EVERY_TWO, "patience": 2})
    why = f"the best on held-out text, {out / 'checkpoint-2'}, is missing"
    assert f"trained for 6 steps, the last; {why}" in capsys.readouterr().out
    log = (out / "training.log").read_text()
    assert f"WARNING {why}: the result is the last checkpoint, at step 6" in log
    record = json.loads((tmp_path / "run.manifest.json").read_text())
    assert record["main"].endswith("checkpoint-6")


def test_the_log_file_holds_the_diagnosis(run):
    assert "a step's time: " in (run() / "training.log").read_text()


@pytest.fixture(scope="module")
def router_alone(text_data):
    """The mixture, with no weight but the router's."""
    loss = {"ce": 0.0, "kd": 0.0, "router": 1.0}
    return {**text_data, "sources": [s | {"loss": loss} for s in text_data["sources"]]}


@pytest.mark.parametrize("offline", [False, True])
def test_patience_with_nothing_to_judge_by_is_refused_before_anything_is_loaded(
    run, router_alone, offline
):
    with pytest.raises(ConfigError, match="no held-out source has a ce or kd weight") as caught:
        run(
            student="/nowhere", offline=offline, data=router_alone,
            evaluation={**EVERY_TWO, "patience": 2},
        )  # fmt: skip
    assert "leave evaluation.patience out" in caught.value.hint


def test_patience_may_go_by_text_with_weights_of_its_own(
    make_config, text_data, router_alone, tmp_path
):
    judged = {**EVERY_TWO, "patience": 2, "data": text_data}
    config = make_config(data=router_alone, evaluation=judged)
    assert online_request(config, Workspace(tmp_path), 1).keeps_best


def test_a_source_that_trains_on_everything_is_not_judged_by(run, router_alone):
    learned, other = router_alone["sources"]
    learned = learned | {"split": "all", "loss": {"ce": 1.0, "kd": 0.0}}
    with pytest.raises(ConfigError, match="no held-out source has a ce or kd weight"):
        run(
            data=router_alone | {"sources": [learned, other]},
            evaluation={**EVERY_TWO, "patience": 2},
        )


def test_an_objective_of_zero_throughout_has_no_best(run, router_alone):
    out = run(data=router_alone, train_router=True, evaluation=EVERY_TWO)
    evaluations = [record for record in read_metrics(out) if "eval" in record]
    assert len(evaluations) == 6
    assert all(record["held_out_objective"] is None for record in evaluations)
    assert read_best(out) is None
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-10"}
    assert read_metrics(out)[-1]["best_step"] is None


def test_no_disk_is_planned_for_a_best_that_is_not_kept(make_config, router_alone, tmp_path):
    planned = [
        plan.checkpoint_bytes(
            online_request(make_config(evaluation=EVERY_TWO, **data), Workspace(tmp_path), 1), [100]
        )
        for data in ({}, {"data": router_alone})
    ]
    assert planned[0] - planned[1] == 2 * 100
