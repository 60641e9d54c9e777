"""Which losses stop a run."""

import pytest

from nexus_cli.core.train.guard import ExplodingLossError, LossGuard, NotFiniteError

NAN, INF = float("nan"), float("inf")


def seasoned(limit=5.0, level=2.0):
    guard = LossGuard(limit)
    for step in range(20):
        assert guard.check(level + 0.1 * (step % 3), 1.0) is None
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [(NAN, 1.0, "loss is nan"), (-INF, 1.0, "loss is -inf"), (1.0, INF, "norm is inf")],
)
def test_what_is_not_finite_stops_at_once(loss, norm, words):
    with pytest.raises(NotFiniteError, match=words):
        LossGuard(None).check(loss, norm)


def test_the_third_far_loss_in_a_row_stops_and_the_first_two_warn():
    guard = seasoned()
    assert "the loss is 9, and was 2.1 before" in guard.check(9.0, 1.0)
    assert guard.check(12.0, 1.0) is not None
    with pytest.raises(ExplodingLossError, match="3 steps in a row"):
        guard.check(12.0, 1.0)


def test_a_usual_loss_between_starts_the_count_again_and_far_ones_never_become_usual():
    guard = seasoned()
    for _ in range(30):
        guard.check(50.0, 1.0)
        guard.check(50.0, 1.0)
        assert guard.check(2.0, 1.0) is None
    assert guard.usual == pytest.approx(2.0, abs=0.2)


def test_it_takes_both_nats_and_times():
    # 4.9 nats above 0.1 is 50 times, but near; 6 above 10 is far, but not three times.
    assert seasoned(level=0.1).check(5.0, 1.0) is None
    assert seasoned(level=10.0).check(16.5, 1.0) is None


def test_nothing_is_unusual_before_there_is_a_usual_loss_or_without_a_limit():
    young = LossGuard(5.0)
    assert all(young.check(loss, 1.0) is None for loss in (0.01, 90.0, 90.0, 90.0, 90.0))
    assert all(seasoned(limit=None).check(1e6, 1.0) is None for _ in range(5))


def test_a_resumed_guard_remembers_what_was_usual_and_an_explosion_that_had_begun():
    guard = LossGuard(5.0)
    guard.remember([2.0] * 20 + [30.0, 30.0])
    assert guard.usual == 2.0
    assert guard.alarmed
    with pytest.raises(ExplodingLossError):
        guard.check(30.0, 1.0)
