"""Evaluation in the loop: the best checkpoint stays, and a run that gets no better ends."""

import json

import pytest

from nexus_cli.core.train.best import Best, BestKeeper, read_best
from nexus_cli.errors import ConfigError, WorkspaceError
from nexus_cli.io.metrics import read_metrics
from nexus_cli.pipeline import train
from nexus_cli.pipeline.training import assemble


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
