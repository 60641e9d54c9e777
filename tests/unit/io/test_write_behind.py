import threading
import time

import pytest

from nexus_cli.io.write_behind import WriteBehind

SOON = 10.0  # seconds; a test that waits so long has failed


class Gate:
    """A job that does not end before it is let go."""

    def __init__(self):
        self.started, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.started.set()
        assert self.opened.wait(SOON)


def failing():
    raise OSError("no space")


def test_jobs_run_in_order_and_all_have_ended_with_the_block():
    done = []
    with WriteBehind(pending=3) as behind:
        for number in range(20):
            behind.run(lambda number=number: done.append(number))
    assert done == list(range(20))


def test_jobs_run_in_one_other_thread():
    threads = set()
    with WriteBehind() as behind:
        for _ in range(5):
            behind.run(lambda: threads.add(threading.get_ident()))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_the_caller_goes_on_until_as_many_jobs_wait_as_may():
    gate, calls = Gate(), []

    def call():
        with WriteBehind(pending=3) as behind:
            for number in range(4):
                behind.run(gate if number == 0 else lambda: None)
                calls.append(number)

    caller = threading.Thread(target=call)
    caller.start()
    assert gate.started.wait(SOON)
    while len(calls) < 3:
        time.sleep(0.001)
    caller.join(0.1)
    assert calls == [0, 1, 2], "the fourth waits"
    gate.opened.set()
    caller.join(SOON)
    assert calls == [0, 1, 2, 3]


def test_what_the_caller_waits_is_counted():
    with WriteBehind(pending=1) as behind:
        behind.run(lambda: time.sleep(0.2))
        assert behind.waited < 0.1
        behind.run(lambda: time.sleep(0.2))
        assert 0.1 < behind.waited < 0.4
    assert behind.waited > 0.3, "and the wait at the end"


def test_an_error_comes_up_at_a_later_call_and_the_jobs_after_it_are_dropped():
    done, gate, failed = [], Gate(), threading.Event()

    def fail():
        failed.set()
        failing()

    def call():
        with WriteBehind(pending=4) as behind:
            behind.run(gate)
            behind.run(fail)
            behind.run(lambda: done.append("after"))
            gate.opened.set()
            assert failed.wait(SOON)
            for _ in range(5):
                behind.run(lambda: done.append("later"))
            done.append("unreached")

    with pytest.raises(OSError, match="no space"):
        call()
    assert done == []


def test_an_error_of_the_last_job_comes_up_at_the_end():
    with pytest.raises(OSError, match="no space"), WriteBehind() as behind:
        behind.run(failing)


def test_an_error_in_the_block_drops_what_waits_and_is_not_hidden():
    done, gate = [], Gate()

    def later():
        time.sleep(0.05)
        gate.opened.set()

    def call():
        with WriteBehind() as behind:
            behind.run(gate)
            behind.run(lambda: done.append("pending"))
            assert gate.started.wait(SOON)
            threading.Thread(target=later).start()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call()
    assert done == []
