"""Which evaluation is the best, and that it is remembered."""

import pytest

from nexus_cli.core.train.best import FILENAME, Best, BestKeeper, held_out_objective, read_best
from nexus_cli.core.train.step import SourceWeights
from nexus_cli.errors import ArtifactError

WEIGHTS = {"domain": SourceWeights(1.0, 0.1, 0.0), "replay": SourceWeights(0.0, 1.0, 0.0)}


def results(domain, replay_kd):
    return {"domain": {"loss": domain, "kd": 0.5}, "replay": {"loss": 9.0, "kd": replay_kd}}


def test_the_objective_is_the_runs_own_on_held_out_text():
    expected = ((2.0 + 0.1 * 0.5) + 0.25) / 2  # the loss of replay text counts for nothing
    assert held_out_objective(results(2.0, 0.25), WEIGHTS) == pytest.approx(expected)


def test_without_a_teacher_the_cross_entropy_is_left():
    plain = {"domain": {"loss": 3.0}}
    assert held_out_objective(plain, WEIGHTS) == 3.0


def test_the_best_is_written_and_found_by_a_resumed_run(tmp_path, alone):
    keeper = BestKeeper(tmp_path, WEIGHTS, alone, start=0)
    assert keeper.best is None
    keeper.keep(Best(4, 1.5))
    assert read_best(tmp_path) == Best(4, 1.5)
    assert BestKeeper(tmp_path, WEIGHTS, alone, start=6).best == Best(4, 1.5)


def test_a_best_that_comes_after_the_start_never_happened(tmp_path, alone):
    BestKeeper(tmp_path, WEIGHTS, alone, start=0).keep(Best(8, 1.5))
    assert BestKeeper(tmp_path, WEIGHTS, alone, start=6).best is None
    assert BestKeeper(tmp_path, WEIGHTS, alone, start=0).best is None


@pytest.mark.parametrize(("step", "count"), [(4, 0), (6, 1), (8, 2), (9, 3)])
def test_evaluations_are_counted_from_step_numbers(step, count):
    assert Best(4, 1.0).evaluations_until(step, every=2) == count  # 9: the last, out of turn


@pytest.mark.parametrize("text", ["", "{}", '{"step": "x", "objective": 1}', "[1]"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / FILENAME).write_text(text)
    with pytest.raises(ArtifactError, match=r"best\.json is damaged"):
        read_best(tmp_path)
