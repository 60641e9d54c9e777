"""The loop alone, on real parts: what it moves, records, and exchanges."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from nexus_cli.core.distill.schedule import Schedule
from nexus_cli.core.distill.self_teacher import SelfTeacher
from nexus_cli.core.train import loop as loop_module
from nexus_cli.core.train.best import BestKeeper
from nexus_cli.core.train.evaluation import HeldOut, evaluate
from nexus_cli.core.train.feed import Feed, StepBatches
from nexus_cli.core.train.guard import ExplodingLossError
from nexus_cli.core.train.loop import Loop, LoopSettings, Parts, Progress
from nexus_cli.core.train.optim import Rates, build_optimizer
from nexus_cli.core.train.signals import StopRequest
from nexus_cli.core.train.step import DistillationStep, Objective, SourceWeights

SOURCES = ("domain", "replay")


class Memory(list):
    """A recorder that keeps its records."""

    def write(self, record):
        self.append(dict(record))


def digests(model, masters):
    return {
        name: hashlib.sha256(parameter.numpy(force=True).tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
        if name not in masters
    }


@pytest.fixture
def make_loop(make_student, blocks, alone):
    def make(max_steps=4, keeper=None, **changes):
        model, masters = make_student()
        place = np.arange(4 * max_steps)
        order = place // 2 + len(blocks) // 2 * (place % 2)  # the sources take turns
        order %= len(blocks)
        batches = StepBatches(blocks, order, 2, 2)
        objective = Objective((SourceWeights(1.0, 0.1, 0.0), SourceWeights(0.0, 1.0, 0.0)))
        saved = []

        def save(progress):
            saved.append(progress.step)
            return f"checkpoint-{progress.step}"

        parts = Parts(
            module=DistillationStep(model, objective),
            masters=masters,
            optimizer=build_optimizer(masters, weight_decay=0.0),
            schedule=Schedule(max_steps),
            feed=Feed(batches, SelfTeacher(model, router_logits=True), alone.device),
            world=alone,
            recorder=Memory(),
            save=save,
            evaluate=dict,
            stop=StopRequest(),
            keeper=keeper,
        )
        settings = LoopSettings(
            max_steps=max_steps,
            clip_norm=0.5,
            rates=Rates(1e-2, 1e-2, 0.0, 0.0),
            sources=SOURCES,
            kd_weight=1.0,
            num_layers=2,
            **changes,
        )
        return Loop(parts, settings, Progress()), model, saved

    return make


def test_every_frozen_tensor_keeps_its_bytes_and_every_master_moves(make_loop):
    loop, model, _ = make_loop()
    frozen = digests(model, loop.parts.masters)
    assert any("blocks" in name for name in frozen)
    before = {name: master.detach().clone() for name, master in loop.parts.masters.items()}
    assert loop.run() == 0
    assert digests(model, loop.parts.masters) == frozen
    assert all(not torch.equal(loop.parts.masters[name], before[name]) for name in before)


def test_every_step_leaves_a_record_with_its_losses_rates_and_drift(make_loop):
    loop, _, saved = make_loop(save_every=2, watch_every=2)
    loop.run()
    steps = [record for record in loop.parts.recorder if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        domain, replay = (record["sources"][name] for name in SOURCES)
        assert record["ce"] == pytest.approx((domain["ce"] + replay["ce"]) / 2, rel=0.1)
        assert record["clipped"] == (record["grad_norm"] > 0.5)
        assert record["learning_rate"] == record["gate_learning_rate"] == 1e-2
        assert record["tokens_per_second"] > 0
        assert record["memory_gib"] > 0
        assert ("drift_kl" in record) == (record["step"] in (1, 2, 4))
    assert steps[-1]["epoch"] == 1.0
    assert saved == [2, 4]
    events = [(r["step"], r["event"]) for r in loop.parts.recorder if "event" in r]
    assert events == [(2, "checkpoint"), (4, "checkpoint"), (4, "finish")]


def test_a_stop_between_steps_saves_once_and_gives_the_signal(make_loop):
    loop, _, saved = make_loop(save_every=1)
    real = loop._step

    def step(counts):
        real(counts)
        if loop.progress.step == 2:
            loop.parts.stop.received = 15

    loop._step = step
    assert loop.run() == 15
    assert saved == [1, 2]


def test_held_out_losses_do_not_depend_on_the_batches(make_student, blocks, alone):
    model, _ = make_student()
    step = DistillationStep(model, Objective((SourceWeights(1.0, 0.0, 0.0),) * 2))
    teacher = SelfTeacher(model)
    cuts = [[np.arange(16)], [np.array([i]) for i in range(16)]]
    whole, single = (
        evaluate(step, HeldOut(SOURCES, [blocks.batch(part) for part in cut]), teacher, alone)
        for cut in cuts
    )
    for name in SOURCES:
        for key in ("loss", "perplexity", "kd"):
            assert whole[name][key] == pytest.approx(single[name][key], rel=1e-5)
        assert whole[name]["perplexity"] == pytest.approx(np.exp(whole[name]["loss"]))
        assert whole[name]["kd"] > 0.01


def test_a_loss_that_explodes_stops_with_its_batch_named_and_its_gradient_unused(make_loop):
    loop, _, saved = make_loop(max_steps=16, explosion=0.5)
    honest, before = loop.parts.module.forward, {}

    def forward(batch, signal, scale):
        output = honest(batch, signal, scale)
        worst = loop.parts.feed.micro_batches(loop.progress.step)[1]
        if loop.progress.step >= 11 and torch.equal(batch.index_B, worst.index_B):
            output.sums["loss"] += 100.0
        before.update({n: m.detach().clone() for n, m in loop.parts.masters.items()})
        return output

    loop.parts.module.forward = forward
    worst = loop.parts.feed.batches.micro_batches(13)[1].index_B.tolist()
    with pytest.raises(ExplodingLossError, match=rf"in step 14; .* sequences \[{worst[0]}, "):
        loop.run()
    assert loop.progress.step == 13
    assert saved == []
    assert all(torch.equal(loop.parts.masters[n], value) for n, value in before.items())


def test_every_step_says_how_its_time_was_spent_and_somebody_may_watch(make_loop):
    loop, _, _ = make_loop(max_steps=3)
    lines = []
    loop.parts.show = lines.append
    loop.run()
    steps = [record for record in loop.parts.recorder if "loss" in record]
    for record in steps:
        assert record["seconds"].keys() == {
            "data", "teacher", "forward", "backward", "optimizer", "other",
        }  # fmt: skip
        assert record["seconds"]["forward"] > record["seconds"]["data"] >= 0
    assert [line.partition("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]


def test_the_forecast_learns_which_evaluations_were_the_best_so_far(make_loop, alone, tmp_path):
    keeper = BestKeeper(tmp_path, {"domain": SourceWeights(1.0, 0.0, 0.0)}, alone, start=0)
    loop, _, saved = make_loop(keeper=keeper, evaluate_every=1)
    losses = iter((9.0, 8.0, 8.5, 7.0, 7.5))  # at steps 0 to 4
    loop.parts.evaluate = lambda: {"domain": {"loss": next(losses)}}
    loop.run()
    assert loop._forecast._spent.improved == [True, False, True, False]  # step 0 saves nothing
    assert saved == [1, 3, 4]


def test_a_held_out_number_that_rounds_to_zero_has_no_sign_and_its_record_is_true(
    make_loop, monkeypatch
):
    loop, _, _ = make_loop(max_steps=1, evaluate_every=1)
    loop.parts.evaluate = lambda: {"domain": {"loss": 2.0, "kd": -1e-7}}
    lines = []
    monkeypatch.setattr(loop_module.log, "info", lambda text, *values: lines.append(text % values))
    loop.run()
    assert "held-out domain at step 0: loss 2.0000  kd 0.0000" in lines
    assert next(r for r in loop.parts.recorder if "eval" in r)["eval"]["domain"]["kd"] == -1e-7
