"""Curves keep gaps, spikes and ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nexus_cli.pipeline.plotting.series import (
    Series,
    eval_names,
    event_steps,
    extract,
    smooth,
    thin,
    window_of,
)


def curve(values: list[float], every: int = 1) -> Series:
    return Series(np.arange(len(values), dtype=float) * every, np.array(values, dtype=float))


def test_a_missing_key_is_no_point_and_a_null_is_a_gap() -> None:
    records = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": None}, {"step": 4}]
    found = extract(records, "loss")
    assert found.steps_P.tolist() == [1, 3]
    assert math.isnan(found.values_P[1])
    assert found.gaps.tolist() == [3]


def test_the_later_of_two_records_of_a_step_counts_and_steps_ascend() -> None:
    records = [{"step": 3, "x": 1}, {"step": 1, "x": 5}, {"step": 3, "x": 2}]
    found = extract(records, "x")
    assert found.steps_P.tolist() == [1, 3]
    assert found.values_P.tolist() == [5, 2]


def test_keys_reach_into_evaluations_of_any_name() -> None:
    records = [{"step": 5, "eval": {"a/b.jsonl": {"perplexity": 9.0}, "general": {}}}]
    assert extract(records, ("eval", "a/b.jsonl", "perplexity")).values_P.tolist() == [9.0]
    assert len(extract(records, ("eval", "general", "perplexity"))) == 0
    assert eval_names(records) == ["a/b.jsonl", "general"]


def test_events_are_found_by_kind() -> None:
    records = [{"step": 9, "event": "sfa"}, {"step": 4, "event": "sfa"}, {"step": 4, "event": "x"}]
    assert event_steps(records, "sfa") == [4, 9]


@pytest.mark.parametrize("every", [1, 7])
def test_smoothing_is_the_mean_of_the_window(every: int) -> None:
    values = np.random.default_rng(0).normal(size=200)
    smoothed = smooth(curve(values.tolist(), every), 20 * every)
    for at in (50, 100, 149):
        assert smoothed.values_P[at] == pytest.approx(values[at - 10 : at + 11].mean())


def test_a_line_is_not_bent_by_smoothing_away_from_its_ends() -> None:
    line = curve(list(range(100)))
    smoothed = smooth(line, 20).values_P
    np.testing.assert_allclose(smoothed[10:-10], line.values_P[10:-10])
    assert abs(smoothed[0] - 0) <= 2.5


def test_gaps_stay_gaps_and_do_not_poison_the_rest() -> None:
    values = [1.0] * 20
    values[7] = math.nan
    smoothed = smooth(curve(values), 6).values_P
    assert np.isnan(smoothed).nonzero()[0].tolist() == [7]
    np.testing.assert_allclose(np.delete(smoothed, 7), 1.0)


def test_the_window_is_at_most_a_fifth_of_the_run() -> None:
    assert window_of(curve([0.0] * 101), 50) == 20
    assert window_of(curve([0.0] * 1001), 50) == 50
    assert window_of(curve([0.0]), 50) == 1


def test_a_thinned_curve_keeps_every_spike() -> None:
    values = np.zeros(10_000)
    values[1234], values[4321] = 50.0, -7.0
    band = thin(curve(values.tolist()), bins=100)
    assert len(band.steps_B) == 100
    assert band.high_B.max() == 50.0
    assert band.low_B.min() == -7.0
    assert band.mean_B.mean() == pytest.approx(values.mean())


def test_a_bin_of_gaps_alone_is_a_gap() -> None:
    band = thin(curve([1.0, 1.0, math.nan, math.nan]), bins=2)
    assert math.isnan(band.mean_B[1])
    assert band.mean_B[0] == 1.0


def test_a_constant_is_known_despite_gaps() -> None:
    assert curve([2.0, math.nan, 2.0]).constant == 2.0
    assert curve([2.0, 3.0]).constant is None
    assert curve([math.nan]).constant is None
