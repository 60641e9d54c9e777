"""A run that was killed, stopped or changed: what goes on, what starts over, what is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nexus_cli.core.train import checkpoints
from nexus_cli.core.train.loop import Loop
from nexus_cli.errors import ArtifactError, ConfigError, Interrupted, ResourceError, WorkspaceError
from nexus_cli.io.metrics import read_metrics

AVERAGED = {"averaging": {"every": 3, "beta": 0.3, "anchor": "previous"}}


class Killed(BaseException):
    """Ends a run where a kill would: nothing after it is done."""


@pytest.fixture
def die_in_step(monkeypatch):
    """Make step ``number`` of the next run not happen."""
    real = Loop._step

    def arrange(number, end):
        def step(self, counts):
            if self.progress.step + 1 == number:
                end()
            real(self, counts)

        monkeypatch.setattr(Loop, "_step", step)

    yield arrange
    monkeypatch.setattr(Loop, "_step", real)


def kill():
    raise Killed


def names(directory):
    return sorted(path.name for path in directory.glob("checkpoint-*"))


@pytest.mark.parametrize("offline", [False, True], ids=["train", "train-offline"])
@pytest.mark.parametrize("settings", [{}, AVERAGED | {"train_router": True}], ids=["plain", "all"])
def test_ten_steps_are_five_a_kill_and_five_bit_for_bit(
    run, losses, trained_bytes, teacher_store, die_in_step, monkeypatch, offline, settings
):
    teacher = {"teacher": {"store": str(teacher_store)}} if offline else {}
    whole = run("whole", offline=offline, **teacher, **settings)
    with monkeypatch.context() as patched:
        die_in_step(8, kill)
        with pytest.raises(Killed):
            run("killed", offline=offline, **teacher, **settings)
        patched.undo()
    directory = whole.with_name("killed")
    monkeypatch.undo()
    assert names(directory) == ["checkpoint-5"]
    run("killed", offline=offline, **teacher, **settings)
    assert losses(directory) == losses(whole)
    assert trained_bytes(directory / "checkpoint-10") == trained_bytes(whole / "checkpoint-10")
    events = [record.get("event") for record in read_metrics(directory)]
    assert events.count("resume") == 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_saves_and_says_how_to_go_on(
    run, losses, die_in_step, monkeypatch, tmp_path, number, code
):
    die_in_step(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match="checkpoint-3 is saved") as caught:
        run()
    monkeypatch.undo()
    assert caught.value.exit_code == code
    assert "same command again" in str(caught.value.hint)
    assert names(tmp_path / "run") == ["checkpoint-3"]
    assert [record["step"] for record in losses(run())] == list(range(1, 11))


def test_a_finished_run_is_not_run_again(run):
    directory = run(max_steps=2)
    before = (directory / "metrics.jsonl").read_bytes()
    run(max_steps=2)
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_an_unfinished_run_of_other_settings_is_refused_by_name(run, die_in_step, monkeypatch):
    die_in_step(7, kill)
    with pytest.raises(Killed):
        run()
    monkeypatch.undo()
    with pytest.raises(WorkspaceError, match=r"optimizer\.learning_rate") as caught:
        run(optimizer={"learning_rate": 0.5})
    assert "--force" in str(caught.value.hint)
    directory = run(optimizer={"learning_rate": 0.5}, force=True, max_steps=2)
    assert names(directory) == ["checkpoint-2"]


def test_another_split_of_the_same_step_may_go_on(run, losses, die_in_step, monkeypatch):
    whole = run("whole", batch_size=4)
    die_in_step(6, kill)
    with pytest.raises(Killed):
        run(batch_size=4)
    monkeypatch.undo()
    directory = run(batch_size=2, gradient_accumulation_steps=2)
    for mine, theirs in zip(losses(directory), losses(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    with pytest.raises(WorkspaceError):
        run(batch_size=8)


def test_a_named_checkpoint_is_gone_on_from_into_another_folder(run, losses):
    first = run("first")
    checkpoint = first / "checkpoint-5"
    second = run("second", runtime={"device": "cpu", "resume": str(checkpoint)})
    assert losses(second) == losses(first)[5:]
    with pytest.raises(ConfigError, match="no checkpoint"):
        run("third", runtime={"device": "cpu", "resume": str(first / "checkpoint-6")})


def test_going_back_before_later_checkpoints_needs_force(run):
    first = run("first")
    back = {"device": "cpu", "resume": str(first / "checkpoint-5"), "save_every": 5}
    with pytest.raises(WorkspaceError):
        run("first", runtime=back, max_steps=8)
    run("first", runtime=back, max_steps=8, force=True)
    assert names(first) == ["checkpoint-5", "checkpoint-8"]


def test_only_the_newest_checkpoints_stay_and_two_keep_their_state(run):
    directory = run(runtime={"device": "cpu", "save_every": 2, "keep_last": 3})
    assert names(directory) == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]
    with_state = [path.parent.name for path in directory.glob("*/training_state")]
    assert sorted(with_state) == ["checkpoint-10", "checkpoint-8"]
    assert not [path for path in directory.iterdir() if path.name.endswith(".tmp")]
    with pytest.raises(ConfigError, match="without its training state"):
        run("other", runtime={"device": "cpu", "resume": str(directory / "checkpoint-6")})


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_training_state_is_named(run, die_in_step, monkeypatch, tmp_path, damage):
    die_in_step(7, kill)
    with pytest.raises(Killed):
        run()
    monkeypatch.undo()
    path = tmp_path / "run" / "checkpoint-5" / "training_state" / "moments.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "truncate":
        path.write_bytes(content[:-100])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"moments\.safetensors is damaged"):
        run()


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    run, trained_bytes, monkeypatch, tmp_path
):
    whole = run("whole")
    real = checkpoints.write_state

    def torn(directory, state):
        real(directory, state)
        if state.step == 10:
            (directory / "masters.safetensors").write_bytes(b"half")
            raise Killed

    monkeypatch.setattr(checkpoints, "write_state", torn)
    with pytest.raises(Killed):
        run()
    monkeypatch.undo()
    assert names(tmp_path / "run") == ["checkpoint-5"]
    assert trained_bytes(run() / "checkpoint-10") == trained_bytes(whole / "checkpoint-10")


def test_a_full_disk_is_said_and_the_checkpoint_before_is_gone_on_from(
    run, losses, monkeypatch, tmp_path
):
    real = checkpoints.write_state

    def full(directory, state):
        if state.step == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(directory, state)

    monkeypatch.setattr(checkpoints, "write_state", full)
    with pytest.raises(ResourceError, match="No space left") as caught:
        run()
    monkeypatch.undo()
    assert "free some disk space" in str(caught.value.hint)
    assert names(tmp_path / "run") == ["checkpoint-5"]
    left = tmp_path / "run" / ".checkpoint-10.tmp"
    left.mkdir()  # as a kill would have left it
    assert len(losses(run())) == 10
    assert not left.exists()


def test_sigterm_ends_the_command_with_143_and_the_same_command_finishes_it(
    tiny_converted_dir, training_text, tmp_path
):
    command = [
        *(sys.executable, "-m", "nexus_cli", "train"),
        *("--student-model", tiny_converted_dir, "--data", training_text / "domain.jsonl"),
        *("--max-steps", "60", "--batch-size", "2", "--device", "cpu", "--output-dir", "out"),
        *("--set", "data.seq_len=32", "--set", "evaluation.every=null"),
    ]
    words = [str(word) for word in command]
    started = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("grad_norm") >= 3):
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=120)[1]
    assert started.returncode == 143, said
    assert "hint: give the same command again" in said
    [saved] = names(tmp_path / "out")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["step"] for r in steps if "loss" in r] == list(range(1, 61))
    assert {"step": int(saved.partition("-")[2]), "event": "resume"}.items() <= next(
        record for record in steps if record.get("event") == "resume"
    ).items()
