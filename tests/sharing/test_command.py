"""Pushing and pulling as a user types it, in processes of their own."""

from __future__ import annotations

from nexus_cli.io import model_dir


def test_a_model_goes_to_the_hub_and_comes_back_the_same(nexus, hub, machine, tmp_path):
    environment = hub.environment(machine.home)
    push = ("convert", "--adapter", "--input", machine.model, "--output", "small")
    pull = ("convert", "--input", "hf://tester/small", "--output", "again")
    for args in ((*push, "--push-to-hub", "tester/small", "--public"), pull):
        done = nexus(*args, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
    assert not hub.repos["tester/small"].private
    assert model_dir.fingerprint(tmp_path / "again") == model_dir.fingerprint(machine.model)


def test_a_refusal_is_one_line_a_hint_and_an_exit_code(nexus, hub, adapter, tmp_path):
    push = ("convert", "--adapter", "--input", adapter, "--push-to-hub", "tester/small")
    done = nexus(*push, cwd=tmp_path, env=hub.environment(tmp_path / "home", "may-read"))
    assert done.returncode == 5
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: cannot push to tester/small: the token may not do that")
    assert hint.startswith("hint: ")
