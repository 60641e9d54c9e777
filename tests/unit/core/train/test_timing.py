"""The clock of a step's phases."""

import time

import pytest
import torch

from nexus_cli.core.train.timing import PhaseClock, Stopwatch

CPU = torch.device("cpu")


def test_phases_add_up_and_the_rest_is_other():
    clock = PhaseClock(CPU)
    clock.start(waits=False)
    began = time.perf_counter()
    for _ in range(2):
        with clock.phase("forward"):
            time.sleep(0.02)
    time.sleep(0.01)
    seconds, whole = clock.read(), time.perf_counter() - began
    assert seconds.keys() == {"forward", "other"}
    assert seconds["forward"] >= 0.04
    assert seconds["other"] >= 0.01
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.01)


def test_a_new_step_starts_from_nothing():
    clock = PhaseClock(CPU)
    clock.start(waits=True)
    with clock.phase("data"):
        pass
    clock.start(waits=True)
    assert clock.read().keys() == {"other"}


def test_a_stopwatch_counts_from_its_last_reading():
    watch = Stopwatch()
    time.sleep(0.05)
    assert 0 < watch.rate(1) <= 20
    assert watch.rate(1000) > 1000
