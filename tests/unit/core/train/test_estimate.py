"""How long a run will take."""

from __future__ import annotations

from datetime import datetime

import pytest

from nexus_cli.core.train.estimate import (
    Durations,
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
    left = Remaining.of(step, max_steps, evaluate_every=evaluate_every, save_every=save_every)
    assert left == Remaining(max_steps - step, evaluations, checkpoints)


def test_the_warm_up_and_one_slow_step_do_not_count():
    assert step_seconds([]) is None
    assert step_seconds([60.0]) is None
    assert step_seconds([60.0, 2.0, 2.0, 30.0, 2.0]) == 2.0


def test_evaluations_and_checkpoints_count_what_they_were_measured_to_take():
    spent = Durations([60.0, 2.0, 2.0], evaluations=[10.0, 12.0, 99.0], checkpoints=[5.0])
    assert seconds_left(spent, Remaining(100, 3, 2)) == 100 * 2 + 3 * 12 + 2 * 5
    assert seconds_left(Durations([60.0]), Remaining(100, 3, 2)) is None


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
