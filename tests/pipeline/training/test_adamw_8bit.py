"""``--optimizer adamw-8bit`` in a whole run on the CPU: resumed, averaged, beside fp32 AdamW."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from nexus_cli.core.kernels.adamw_8bit import split_master
from nexus_cli.core.train import precision
from nexus_cli.core.train.loop import Loop
from nexus_cli.errors import ConfigError, WorkspaceError
from nexus_cli.io import tensor_files
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.training import optimizer as bytes_of
from nexus_cli.pipeline.training import plan
from nexus_cli.pipeline.training.request import online_request

RATES = {"learning_rate": 1e-2, "gate_learning_rate": 1e-1}
EIGHT_BIT = {"optimizer": RATES | {"kind": "adamw-8bit"}}
CPU = torch.device("cpu")


class Killed(BaseException):
    """Ends a run where a kill would."""


@pytest.fixture(autouse=True)
def split_tiny_matrices(monkeypatch):
    for module in (precision, bytes_of):
        monkeypatch.setattr(module, "SPLIT_FROM", 1024)


@pytest.mark.parametrize(
    "settings",
    [{}, {"averaging": {"every": 3, "beta": 0.3}, "train_router": True}],
    ids=["plain", "all"],
)
def test_ten_steps_are_five_a_kill_and_five_bit_for_bit(
    run, losses, trained_bytes, monkeypatch, settings
):
    whole = run("whole", **EIGHT_BIT, **settings)
    real = Loop._step

    def step(self, counts):
        if self.progress.step == 7:
            raise Killed
        real(self, counts)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_step", step)
        with pytest.raises(Killed):
            run("killed", **EIGHT_BIT, **settings)
    directory = run("killed", **EIGHT_BIT, **settings)
    assert losses(directory) == losses(whole)
    assert trained_bytes(directory / "checkpoint-10") == trained_bytes(whole / "checkpoint-10")


def test_the_loss_curve_is_that_of_fp32_adamw_within_a_thousandth(run, losses):
    curves = [
        [record["loss"] for record in losses(run(kind, optimizer=RATES | {"kind": kind}))]
        for kind in ("adamw", "adamw-8bit")
    ]
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_a_checkpoint_holds_exact_masters_and_the_models_own_weights(run):
    checkpoint = run(**EIGHT_BIT, max_steps=3) / "checkpoint-3"
    masters = load_file(checkpoint / "training_state" / "masters.safetensors")
    model = load_file(checkpoint / "nexus-trained.safetensors")
    matrices = [name for name in masters if masters[name].numel() >= 1024]
    assert matrices
    for name in matrices:
        assert masters[name].dtype == torch.float32
        assert torch.equal(split_master(masters[name])[0], model[name])
        assert not torch.equal(masters[name], model[name].float())


def test_another_split_of_a_step_sums_in_fp32_and_nearly_the_same(run, losses):
    whole = losses(run("whole", **EIGHT_BIT, batch_size=4, max_steps=4))
    split = losses(
        run("split", **EIGHT_BIT, batch_size=1, gradient_accumulation_steps=4, max_steps=4)
    )
    for mine, theirs in zip(whole, split, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


def test_a_run_of_the_other_optimizer_is_not_gone_on_from(run, monkeypatch):
    real = Loop._step

    def step(self, counts):
        if self.progress.step == 6:
            raise Killed
        real(self, counts)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_step", step)
        with pytest.raises(Killed):
            run(optimizer=RATES)
    with pytest.raises(WorkspaceError, match=r"optimizer\.kind \(adamw, now adamw-8bit\)"):
        run(**EIGHT_BIT)


def test_accumulation_on_several_ranks_is_refused(make_config, tmp_path):
    config = make_config(**EIGHT_BIT, gradient_accumulation_steps=2)
    request = online_request(config, Workspace(tmp_path), 2)
    with pytest.raises(ConfigError, match="added in bf16"):
        bytes_of.require_exact_sums(request)
    bytes_of.require_exact_sums(dataclasses.replace(request, world_size=1))


def test_the_plan_counts_its_bytes(make_config, tmp_path):
    requests = [
        online_request(make_config(optimizer=RATES | {"kind": kind}), Workspace(tmp_path), 1)
        for kind in ("adamw", "adamw-8bit")
    ]
    tensors = tensor_files.tensors(requests[0].student.path)
    sizes = plan.trained_sizes(tensors, train_router=False)
    assert sum(sizes) == sum(plan.count_trained(tensors, train_router=False).values())
    large = sum(size for size in sizes if size >= 1024)
    scales = 2 * 4 * sum(-(-size // 256) for size in sizes if size >= 1024)
    adamw, eight = (plan.estimate_memory(each, tensors, sizes, CPU) for each in requests)
    assert adamw.training == 16 * sum(sizes)
    assert eight.training == 16 * (sum(sizes) - large) + 8 * large + scales
    on_disk = [plan.checkpoint_bytes(request, sizes) for request in requests]
    # Two checkpoints keep their state, and a third is whole before the oldest loses its own.
    assert on_disk[0] - on_disk[1] == 3 * (6 * large - scales)
