"""Which evaluation is the best, and that it is remembered."""

import json

import pytest

from nexus_cli.core.train.best import FILENAME, Best, BestKeeper, held_out_objective, read_best
from nexus_cli.core.train.step import SourceWeights
from nexus_cli.errors import ArtifactError
from nexus_cli.io.metrics import FILENAME as METRICS

WEIGHTS = {"domain": SourceWeights(1.0, 0.1, 0.0), "replay": SourceWeights(0.0, 1.0, 0.0)}


def results(domain, replay_kd):
    return {"domain": {"loss": domain, "kd": 0.5}, "replay": {"loss": 9.0, "kd": replay_kd}}


def test_the_objective_is_the_runs_own_on_held_out_text():
    expected = ((2.0 + 0.1 * 0.5) + 0.25) / 2  # the loss of replay text counts for nothing
    assert held_out_objective(results(2.0, 0.25), WEIGHTS) == pytest.approx(expected)


def test_without_a_teacher_the_cross_entropy_is_left():
    plain = {"domain": {"loss": 3.0}}
    assert held_out_objective(plain, WEIGHTS) == 3.0


def record(directory, step, objective, judge="a"):
    with (directory / METRICS).open("a") as file:
        file.write(json.dumps({"step": step, "held_out_objective": objective, "judge": judge}))
        file.write("\n")


def test_a_resumed_run_knows_the_best_by_what_was_measured_though_a_kill_came_before_best_json(
    tmp_path, alone
):
    for step, objective in ((0, 3.0), (2, 2.0), (4, 1.5), (6, 1.6), (8, 1.0)):
        record(tmp_path, step, objective)
    (tmp_path / FILENAME).write_text('{"step": 2, "objective": 2.0}')
    keeper = BestKeeper(tmp_path, WEIGHTS, alone, start=6, judge="a")
    assert (keeper.best, keeper.since) == (Best(4, 1.5), 1)  # step 8 never happened
    assert read_best(tmp_path) == Best(4, 1.5)


def test_a_run_that_starts_and_another_judge_know_nothing(tmp_path, alone):
    record(tmp_path, 4, 1.5)
    record(tmp_path, 6, None)
    assert BestKeeper(tmp_path, WEIGHTS, alone, start=0, judge="a").best is None
    assert BestKeeper(tmp_path, WEIGHTS, alone, start=6, judge="b").best is None
    assert read_best(tmp_path) is None


def test_evaluations_without_improvement_are_counted_and_a_tie_is_none(tmp_path, alone):
    keeper = BestKeeper(tmp_path, WEIGHTS, alone, start=0)
    assert [keeper.see(step, value) for step, value in enumerate((2.0, 1.0, 1.0, 1.5))] == [
        True, True, False, False,
    ]  # fmt: skip
    assert (keeper.best, keeper.since) == (Best(1, 1.0), 2)
    assert keeper.replay == ["replay"]


@pytest.mark.parametrize("text", ["", "{}", '{"step": "x", "objective": 1}', "[1]"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / FILENAME).write_text(text)
    with pytest.raises(ArtifactError, match=r"best\.json is damaged"):
        read_best(tmp_path)
