"""How long a run will take."""

from __future__ import annotations

from datetime import datetime

import pytest

from nexus_cli.core.train.estimate import (
    Durations,
    Forecast,
    Remaining,
    clock,
    seconds_left,
    sentence,
    shown,
    step_seconds,
)

NOON = datetime(2026, 3, 14, 12, 0, 0)  # noqa: DTZ001


@pytest.mark.parametrize("step", [0, 1, 4, 5, 9, 10])
@pytest.mark.parametrize("evaluate_every", [None, 1, 3, 5, 20])
@pytest.mark.parametrize("save_every", [None, 2, 5, 20])
def test_what_remains_is_what_the_loop_will_do(step, evaluate_every, save_every):
    max_steps, evaluations, checkpoints = 10, 0, 0
    for now in range(step + 1, max_steps + 1):
        last = now == max_steps
        evaluations += bool(evaluate_every and (last or now % evaluate_every == 0))
        checkpoints += bool(last or (save_every and now % save_every == 0))
    every = {"evaluate_every": evaluate_every, "save_every": save_every}
    left = Remaining.of(step, max_steps, **every)
    assert left == Remaining(max_steps - step, evaluations, checkpoints)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 9, 10])
@pytest.mark.parametrize("evaluate_every", [None, 1, 3, 5, 20])
@pytest.mark.parametrize("save_every", [None, 2, 5, 20])
def test_a_new_best_costs_a_checkpoint_only_where_none_is_due(step, evaluate_every, save_every):
    chances = sum(
        bool(evaluate_every) and now % evaluate_every == 0 and now % (save_every or 10) != 0
        for now in range(step + 1, 10)
    )
    every = {"evaluate_every": evaluate_every, "save_every": save_every}
    assert Remaining.of(step, 10, **every, keeps_best=True).chances == chances
    assert Remaining.of(step, 10, **every).chances == 0


def test_the_warm_up_and_one_slow_step_do_not_count():
    assert step_seconds([]) is None
    assert step_seconds([60.0]) is None
    assert step_seconds([60.0, 2.0, 2.0, 30.0, 2.0]) == 2.0


def test_evaluations_and_checkpoints_count_what_they_were_measured_to_take():
    spent = Durations([60.0, 2.0, 2.0], evaluations=[10.0, 12.0, 99.0], checkpoints=[5.0])
    assert seconds_left(spent, Remaining(100, 3, 2)) == 100 * 2 + 3 * 12 + 2 * 5
    assert seconds_left(Durations([60.0]), Remaining(100, 3, 2)) is None


def test_new_bests_are_expected_as_often_as_they_were_measured():
    spent = Durations([60.0, 2.0, 2.0], evaluations=[10.0], checkpoints=[5.0])
    left = Remaining(100, 3, 2, chances=8)
    assert (
        seconds_left(spent, left) == 100 * 2 + 3 * 10 + (2 + 8) * 5
    )  # nothing judged: all of them
    spent.improved += [True, False, False, False]
    assert seconds_left(spent, left) == 100 * 2 + 3 * 10 + (2 + 8 / 4) * 5


@pytest.mark.parametrize(("improved", "text"), [(True, "about 4 min"), (False, "about 40 s")])
def test_the_forecast_counts_the_checkpoints_of_new_bests(improved, text):
    forecast = Forecast(15, evaluate_every=1, save_every=None, keeps_best=True)
    forecast._spent = Durations([1.0] * 5, evaluations=[1.0], checkpoints=[20.0])
    forecast.judged(improved=improved)
    said = forecast.said(5)  # ten steps, nine chances and the last checkpoint
    assert said.startswith(f"{text} left")


def test_the_log_says_how_long_until_when_and_what_is_not_known():
    left = Remaining(3300, 3, 2)
    spent = Durations([60.0, 2.0, 2.0])
    assert sentence(spent, left, NOON) == (
        "about 1 h 50 min left, until 13:50 (evaluations and checkpoints not measured yet)"
    )
    spent.evaluations.append(100.0)
    assert sentence(spent, left, NOON) == (
        "about 1 h 55 min left, until 13:55 (checkpoints not measured yet)"
    )
    spent.checkpoints.append(150.0)
    assert sentence(spent, left, NOON) == "about 2 h left, until 14:00"
    assert sentence(Durations(), left, NOON) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "less than a second"),
        (1, "about 1 s"),
        (59.4, "about 59 s"),
        (61, "about 1 min"),
        (59.6 * 60, "about 1 h"),
        (2 * 3600 + 10 * 60, "about 2 h 10 min"),
        (23.8 * 3600, "about 23 h 48 min"),
        (24 * 3600, "about 1 d"),
        (50 * 3600, "about 2 d 2 h"),
    ],
)
def test_durations_are_told_in_two_units(seconds, text):
    assert shown(seconds) == text


def test_another_day_has_its_date():
    assert clock(NOON, 3600) == "13:00"
    assert clock(NOON, 13 * 3600) == "2026-03-15 01:00"
