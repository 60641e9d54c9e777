import math
from itertools import pairwise

import pytest

from nexus_cli.core.distill.schedule import Schedule


def scales(schedule):
    return [schedule.at(step).lr_scale for step in range(schedule.total_steps)]


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_no_step_has_a_learning_rate_of_zero_even_if_the_decay_ends_there(decay, warmup):
    schedule = Schedule(20, decay=decay, warmup_steps=warmup, final_ratio=0.0)
    assert min(scales(schedule)) > 0
    assert max(scales(schedule)) <= 1


def test_the_warm_up_rises_evenly_to_the_peak():
    assert scales(Schedule(6, warmup_steps=4)) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_linear_decay_falls_evenly_and_would_end_at_the_final_ratio_one_step_later():
    schedule = Schedule(9, decay="linear", final_ratio=0.1)
    values = scales(schedule)
    drops = [a - b for a, b in zip([1.0, *values], [*values, 0.1], strict=True)]
    assert drops == pytest.approx([0.9 / 10] * 10)


def test_cosine_decay_is_halfway_at_half_time():
    schedule = Schedule(9, decay="cosine", final_ratio=0.2)
    assert schedule.at(4).lr_scale == pytest.approx(0.6)
    values = scales(schedule)
    assert values == sorted(values, reverse=True)


def test_warmup_stable_decay_leaves_the_last_fifth_to_the_decay():
    stages = [Schedule(100, decay="wsd", warmup_steps=10).at(step).stage for step in range(100)]
    assert stages == ["warmup"] * 10 + ["stable"] * 70 + ["decay"] * 20


def test_past_the_end_the_values_are_those_of_the_end():
    schedule = Schedule(10, decay="cosine", final_ratio=0.1, temperature=4, final_temperature=2)
    assert schedule.at(10).lr_scale == pytest.approx(0.1)
    assert schedule.at(10) == schedule.at(99)
    assert schedule.at(99).temperature == 2


def test_the_temperature_holds_and_then_moves_evenly_to_its_last_value_at_the_last_step():
    schedule = Schedule(11, temperature=4.0, final_temperature=2.0, temperature_hold=3 / 11)
    values = [schedule.at(step).temperature for step in range(11)]
    assert values[:4] == [4.0] * 4
    assert values[-1] == pytest.approx(2.0)
    steps = [a - b for a, b in pairwise(values[3:])]
    assert steps == pytest.approx([2 / 7] * 7)


def test_one_temperature_stays():
    schedule = Schedule(5, temperature=2.0)
    assert {schedule.at(step).temperature for step in range(5)} == {2.0}
    assert schedule.temperatures == (2.0,)
    moving = Schedule(5, temperature=4.0, final_temperature=2.0)
    assert moving.temperatures == (4.0, 3.5, 3.0, 2.5, 2.0)


def test_the_kl_weight_rises_to_one():
    schedule = Schedule(5, kd_warmup_steps=2)
    assert [schedule.at(step).kd_scale for step in range(5)] == [0.5, 1, 1, 1, 1]
    assert Schedule(5).at(0).kd_scale == 1


def test_the_advanced_set_has_the_stages_and_values_of_the_design():
    schedule = Schedule.advanced(1000)
    values = [schedule.at(step) for step in range(1000)]
    stages = [value.stage for value in values]
    assert stages == ["warmup"] * 500 + ["stable"] * 200 + ["decay"] * 300
    assert values[499].lr_scale == values[699].lr_scale == 1
    assert values[-1].lr_scale == pytest.approx(0.1, abs=1e-3)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 150 / 301))
    assert values[849].lr_scale == pytest.approx(middle)
    assert [value.temperature for value in (values[0], values[300], values[-1])] == [4, 4, 2]
    assert values[0].kd_scale == pytest.approx(1 / 500)
    assert {value.router_bias_scale for value in values[:500]} == {0.001}
    assert {value.router_bias_scale for value in values[500:]} == {0.0}


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_the_advanced_set_fits_any_number_of_steps(total):
    schedule = Schedule.advanced(total)
    assert all(schedule.at(step).lr_scale > 0 for step in range(total))


def test_the_router_biases_never_freeze_unless_told_to():
    assert Schedule(10).at(9).router_bias_scale == 1
    schedule = Schedule.advanced(10, router_bias_freeze_ratio=0.9)
    assert [schedule.at(step).router_bias_scale for step in (8, 9)] == [0.001, 0.0]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"total_steps": 0}, "at least one step"),
        ({"total_steps": 5, "warmup_steps": 6}, "do not fit into 5"),
        ({"total_steps": 5, "warmup_steps": -1}, "cannot be negative"),
        ({"total_steps": 5, "final_ratio": 1.5}, "fraction of the peak"),
        ({"total_steps": 5, "temperature": 0.0}, "must be positive"),
        ({"total_steps": 5, "final_temperature": -1.0}, "must be positive"),
        ({"total_steps": 5, "temperature_hold": 2.0}, "temperature_hold"),
    ],
)
def test_settings_that_make_no_schedule_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Schedule(**settings)
