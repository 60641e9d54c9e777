"""The clock of a step's phases, on a GPU."""

import pytest
import torch

from nexus_cli.core.train.timing import PhaseClock

pytestmark = pytest.mark.gpu


def test_on_a_gpu_only_steps_that_wait_are_timed():
    clock = PhaseClock(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    for waits in (False, True):
        clock.start(waits=waits)
        with clock.phase("forward"):
            for _ in range(20):
                matrix = (matrix @ matrix).clamp(-1, 1)
        assert bool(clock.read()) == waits
    assert clock.read()["forward"] > 1e-3
