"""Training state on disk: exact, without pickle, and refused where it is not whole."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nexus_cli.core.train.checkpoints import find_checkpoints, newest_resumable, save_checkpoint
from nexus_cli.core.train.optim import Rates, build_optimizer, set_rates
from nexus_cli.core.train.state import (
    TrainingState,
    gather_rng,
    optimizer_moments,
    read_state,
    restore,
    restore_rng,
    write_state,
)
from nexus_cli.errors import ArtifactError

NAMES = [f"model.layers.0.mlp.shared_expert.{leaf}" for leaf in ("up_proj.weight", "output_gate")]


def trained(seed, steps):
    torch.manual_seed(seed)
    named = {name: nn.Parameter(torch.randn(4)) for name in NAMES}
    optimizer = build_optimizer(named, weight_decay=0.1)
    for _ in range(steps):
        advance(named, optimizer)
    return named, optimizer


def advance(named, optimizer):
    for parameter in named.values():
        parameter.grad = torch.sin(parameter.detach() * 3)
    set_rates(optimizer, Rates(1e-2, 1e-1, 0.0, 0.0))
    optimizer.step()


def state_of(named, optimizer, alone, step=3):
    return TrainingState(
        step=step,
        tokens=99,
        identity={"settings": {"a": 1}},
        masters=dict(named),
        moments=optimizer_moments(optimizer, named),
        rng=gather_rng(alone),
    )


def test_a_restored_run_goes_on_bit_for_bit(tmp_path, alone):
    named, optimizer = trained(seed=0, steps=3)
    write_state(tmp_path / "state", state_of(named, optimizer, alone))
    other, fresh = trained(seed=1, steps=0)
    state = read_state(tmp_path / "state")
    restore(state, other, fresh)
    assert (state.step, state.tokens, state.identity) == (3, 99, {"settings": {"a": 1}})
    for _ in range(3):
        advance(named, optimizer)
        advance(other, fresh)
    assert all(torch.equal(named[name], other[name]) for name in NAMES)


def test_the_random_generator_goes_on_where_it_was(tmp_path, alone):
    named, optimizer = trained(seed=0, steps=1)
    torch.manual_seed(7)
    write_state(tmp_path / "state", state_of(named, optimizer, alone))
    expected = torch.rand(3)
    torch.manual_seed(8)
    restore_rng(read_state(tmp_path / "state").rng, alone)
    assert torch.equal(torch.rand(3), expected)


def test_no_file_of_the_state_is_a_pickle(tmp_path, alone):
    write_state(tmp_path / "state", state_of(*trained(seed=0, steps=1), alone))
    assert {path.suffix for path in (tmp_path / "state").iterdir()} == {".json", ".safetensors"}
    for path in (tmp_path / "state").glob("*.safetensors"):
        assert path.read_bytes()[8:9] == b"{"


@pytest.mark.parametrize("damage", ["missing", "truncated", "counters", "format"])
def test_a_state_that_is_not_whole_is_refused(tmp_path, alone, damage):
    write_state(tmp_path / "state", state_of(*trained(seed=0, steps=1), alone))
    masters, counters = (tmp_path / "state" / n for n in ("masters.safetensors", "state.json"))
    if damage == "missing":
        masters.unlink()
    elif damage == "truncated":
        masters.write_bytes(masters.read_bytes()[:-4])
    elif damage == "counters":
        counters.write_text(counters.read_text()[:-9])
    else:
        counters.write_text(json.dumps(json.loads(counters.read_text()) | {"format": "x/2"}))
    with pytest.raises(ArtifactError):
        read_state(tmp_path / "state")


def test_a_state_of_other_parameters_is_refused(tmp_path, alone):
    named, optimizer = trained(seed=0, steps=1)
    write_state(tmp_path / "state", state_of(named, optimizer, alone))
    fewer = {NAMES[0]: nn.Parameter(torch.zeros(4))}
    with pytest.raises(ArtifactError, match="another set of parameters"):
        restore(read_state(tmp_path / "state"), fewer, build_optimizer(fewer, weight_decay=0))
    wider = {name: nn.Parameter(torch.zeros(5)) for name in NAMES}
    with pytest.raises(ArtifactError, match="shape"):
        restore(read_state(tmp_path / "state"), wider, build_optimizer(wider, weight_decay=0))


def test_checkpoints_rotate_and_a_half_written_one_is_never_seen(tmp_path, alone):
    named, optimizer = trained(seed=0, steps=1)

    def write_model(target, _):
        (target / "config.json").write_text("{}")

    def fail(target, _):
        write_model(target, _)
        raise OSError("disk full")

    for step in (1, 2, 3, 4):
        state = state_of(named, optimizer, alone, step)
        save_checkpoint(tmp_path, state, write_model, keep_last=3)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, state_of(named, optimizer, alone, 5), fail, keep_last=3)
    found = find_checkpoints(tmp_path)
    assert [(c.step, c.resumable) for c in found] == [(2, False), (3, True), (4, True)]
    assert newest_resumable(tmp_path) == found[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (2, 3, 4)]
    assert find_checkpoints(tmp_path / "nowhere") == []
