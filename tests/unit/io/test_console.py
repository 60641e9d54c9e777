"""What is said where: the log on stderr, results on stdout."""

import logging

import pytest

from nexus_cli.io import console


@pytest.fixture(autouse=True)
def quiet_afterwards():
    yield
    logging.getLogger("nexus_cli").handlers.clear()


def test_in_a_pipe_a_log_record_is_one_line_however_long(capsys):
    console.configure()
    path = "/very/long/" + "folder/" * 40 + "file.json"
    logging.getLogger("nexus_cli.pipeline.toy").info("finished: %s", path)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith(f"finished: {path}\n")


def test_configuring_twice_does_not_say_everything_twice(capsys):
    console.configure()
    console.configure()
    logging.getLogger("nexus_cli").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_results_go_to_stdout_and_only_from_rank_0(capsys, monkeypatch):
    console.result("mine")
    monkeypatch.setenv("RANK", "1")
    console.result("of another rank")
    console.result_table("title", ("a",), [(1,)])
    out, err = capsys.readouterr()
    assert (out, err) == ("mine\n", "")


def test_progress_yields_everything_in_order_and_says_nothing_in_a_pipe(capsys):
    assert list(console.progress(range(5), "work")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")
