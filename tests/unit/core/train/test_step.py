"""The objective: its terms against plain autograd, and no split of a step that changes it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nexus_cli.core.data.blocks import PackedBlocks
from nexus_cli.core.distill.self_teacher import SelfTeacher, frozen_routers
from nexus_cli.core.distill.teacher import DenseSignal
from nexus_cli.core.train.feed import Feed, StepBatches
from nexus_cli.core.train.ranks import agree
from nexus_cli.core.train.recompute import recompute_layers
from nexus_cli.core.train.record import add_sums
from nexus_cli.core.train.step import (
    DistillationStep,
    Objective,
    SourceWeights,
    StepScale,
    target_mask,
)

DOMAIN = SourceWeights(ce=1.0, kd=0.1, router=0.05)
REPLAY = SourceWeights(ce=0.0, kd=1.0, router=0.2)
EVERYTHING = Objective((DOMAIN, REPLAY), load_balance=0.01, router_z=0.001, top_k=2)


def accumulate(make_student, blocks, alone, *, batch_size, objective=EVERYTHING, indices=8):
    """Loss and gradients of one step over the same sequences, ``batch_size`` at a time."""
    model, masters = make_student(train_router=True)
    teacher = SelfTeacher(model, router_logits=True, frozen=frozen_routers(model))
    step = DistillationStep(model, objective)
    order = np.linspace(0, len(blocks) - 1, indices).astype(np.int64)
    batches = StepBatches(blocks, order, batch_size, indices // batch_size)
    feed = Feed(batches, teacher, alone.device)
    counts = agree(feed.micro_batches(0), None, alone)
    scale = StepScale(counts.tokens, counts.sequences, temperature=2.0, kd_scale=0.7, watch=True)
    total = 0.0
    for batch, signal in feed.pairs(0):
        output = step(batch, signal, scale)
        output.loss.backward()
        total += float(output.loss.detach())
    return total, {name: master.grad.clone() for name, master in masters.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_no_split_into_micro_batches_changes_loss_or_gradient(
    make_student, blocks, alone, batch_size
):
    whole_loss, whole = accumulate(make_student, blocks, alone, batch_size=8)
    loss, gradients = accumulate(make_student, blocks, alone, batch_size=batch_size)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], rtol=2e-4, atol=1e-7)


@pytest.fixture
def ragged(blocks):
    """Eight sequences with none, one, some and all of their tokens to learn, in no order."""
    packed, chosen = blocks.packed, slice(4, 12)  # four of either source
    length = packed.seq_len
    counts_N = np.array([1, length, 0, 7, length, 2, 15, 1])
    mask_NS = np.arange(length) >= length - counts_N[:, None]
    some = PackedBlocks(
        input_ids_NS=packed.input_ids_NS[chosen],
        position_ids_NS=packed.position_ids_NS[chosen],
        loss_mask_NS=mask_NS,
        source_N=packed.source_N[chosen],
        num_sources=packed.num_sources,
    )
    return replace(blocks, packed=some)


def take_step(make_student, blocks, alone, *, ranks, accumulation):
    """Loss, gradients and sums of one step over all sequences, rank after rank.

    The ranks' gradients add up in the masters, as an exchange would add them.
    """
    model, masters = make_student(train_router=True)
    teacher = SelfTeacher(model, router_logits=True, frozen=frozen_routers(model))
    step = DistillationStep(model, EVERYTHING)
    order, size = np.arange(len(blocks)), len(blocks) // (ranks * accumulation)
    parts = [StepBatches(blocks, order, size, accumulation, rank, ranks) for rank in range(ranks)]
    counts = agree([b for part in parts for b in part.micro_batches(0)], None, alone)
    scale = StepScale(counts.tokens, counts.sequences, temperature=2.0, kd_scale=0.7, watch=True)
    sums: dict[str, torch.Tensor] = {}
    for part in parts:
        for batch, signal in Feed(part, teacher, alone.device).pairs(0):
            output = step(batch, signal, scale)
            output.loss.backward()
            add_sums(sums, output.sums)
    return sums, {name: master.grad.clone() for name, master in masters.items()}


@pytest.mark.parametrize(
    ("ranks", "accumulation"), [(1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
)
def test_no_split_into_ranks_and_micro_batches_changes_a_ragged_step(
    make_student, ragged, alone, ranks, accumulation
):
    whole_sums, whole = take_step(make_student, ragged, alone, ranks=1, accumulation=1)
    split = {"ranks": ranks, "accumulation": accumulation}
    sums, gradients = take_step(make_student, ragged, alone, **split)
    assert whole_sums["load_balance"] > 0
    assert whole_sums["router_z"] > 0
    assert sums.keys() == whole_sums.keys()
    for name, value in sums.items():
        rounding = 1e-4 if name == "drift" else 0.0  # differences of float32 sums
        torch.testing.assert_close(value, whole_sums[name], rtol=2e-6, atol=rounding, msg=name)
    for name, gradient in gradients.items():
        gap = torch.linalg.vector_norm(gradient - whole[name])
        assert gap < 1e-5 * torch.linalg.vector_norm(whole[name]), name


def test_the_loss_is_the_formula_of_the_design(make_student, blocks):
    model, _ = make_student()
    batch = blocks.batch(np.array([0, 15]))
    signal = SelfTeacher(model, router_logits=True).signal(batch)
    mask = target_mask(batch)
    scale = StepScale(tokens=int(mask.sum()), sequences=2, temperature=2.0, kd_scale=0.5)
    output = DistillationStep(model, EVERYTHING)(batch, signal, scale)

    with torch.no_grad():
        ids, positions = batch.input_ids_BS, batch.position_ids_BS
        run = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        ours = model.model(**run, output_router_logits=True)
        theirs = model.model(**run, output_router_logits=True, shared_experts=False)
    logits, teacher = (model.lm_head(out.last_hidden_state).double() for out in (ours, theirs))
    loss = 0.0
    for row, weights in enumerate((DOMAIN, REPLAY)):
        for t in mask[row].nonzero()[:, 0].tolist():
            label = batch.input_ids_BS[row, t + 1]
            loss += weights.ce * F.cross_entropy(logits[row, t], label)
            loss += weights.kd * 0.5 * kl(teacher[row, t], logits[row, t], 2.0)
            place = row * mask.shape[1] + t
            for a, b in zip(theirs.router_logits, ours.router_logits, strict=True):
                loss += weights.router * kl(a[place].double(), b[place].double(), 1.0) / 2
                loss += 0.001 * b[place].double().logsumexp(0) ** 2 / 2
    loss = loss / mask.sum()
    loss += 0.01 * balance(ours.router_logits, mask, top_k=2) / 2
    assert float(output.loss.detach()) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("settings", [{"divergence": "reverse"}, {"divergence": "jsd"}], ids=str)
def test_the_objective_names_the_divergence_of_the_vocabulary(make_student, blocks, settings):
    model, _ = make_student()
    batch = blocks.batch(np.array([0, 15]))
    signal = SelfTeacher(model).signal(batch)
    mask = target_mask(batch)
    objective = Objective((SourceWeights(0.0, 1.0, 0.0),) * 2, **settings, jsd_beta=0.3)
    scale = StepScale(tokens=int(mask.sum()), sequences=2, temperature=2.0)
    loss = DistillationStep(model, objective)(batch, signal, scale).loss

    with torch.no_grad():
        ids, positions = batch.input_ids_BS, batch.position_ids_BS
        student = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        teacher = model.lm_head(signal.hidden_NH).double()[mask.flatten()]
        student = student.double()[mask]
    if settings["divergence"] == "reverse":
        expected = kl(student, teacher, 2.0)
    else:
        mixture = (0.3 * (teacher / 2).softmax(-1) + 0.7 * (student / 2).softmax(-1)).log()
        expected = 0.3 * kl(teacher, 2 * mixture, 2.0) + 0.7 * kl(student, 2 * mixture, 2.0)
    assert float(loss.detach()) == pytest.approx(float(expected / mask.sum()), rel=1e-5)


def kl(teacher, student, temperature):
    p, q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum()


def balance(router_logits, mask, top_k):
    total = 0.0
    for layer in router_logits:
        experts = layer.shape[-1]
        for every, counted in zip(layer.double().view(*mask.shape, experts), mask, strict=True):
            row = every[counted]
            chosen = F.one_hot(row.topk(top_k).indices, experts).sum(1).double()
            total += experts * ((chosen.mean(0) / top_k) * row.softmax(-1).mean(0)).sum()
    return total / len(router_logits)


def test_kl_to_the_self_teacher_is_exactly_zero_behind_a_closed_gate(make_student, blocks):
    model, masters = make_student(gate=0.0)
    batch = blocks.batch(np.arange(4))
    signal = SelfTeacher(model, router_logits=True).signal(batch)
    output = DistillationStep(model, EVERYTHING)(batch, signal, StepScale(10, 4, watch=True))
    assert float(output.sums["kd_K"].abs().sum()) == 0.0
    assert float(output.sums["router_kl"]) == 0.0
    output.loss.backward()
    for name, master in masters.items():
        moved = master.grad.abs().max() > 0
        assert moved == name.endswith("output_gate")  # the gate learns first, then the expert


def test_the_self_teacher_ignores_what_the_trained_router_has_become(make_student, blocks):
    model, masters = make_student(train_router=True)
    batch = blocks.batch(np.arange(2))
    frozen = frozen_routers(model)
    before = SelfTeacher(model).signal(batch).hidden_NH
    with torch.no_grad():
        for name, master in masters.items():
            if ".router." in name:
                master.add_(1.0 * torch.randn_like(master))
    assert not torch.equal(SelfTeacher(model).signal(batch).hidden_NH, before)
    assert torch.equal(SelfTeacher(model, frozen=frozen).signal(batch).hidden_NH, before)


def test_only_masters_have_gradients_and_the_rest_never_asks_for_one(make_student, blocks):
    model, masters = make_student()
    batch = blocks.batch(np.arange(2))
    signal = SelfTeacher(model).signal(batch)
    objective = Objective((SourceWeights(1.0, 1.0, 0.0),) * 2)
    DistillationStep(model, objective)(batch, signal, StepScale(9, 2)).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    asking = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == asking == set(masters)


def test_router_kl_without_the_teachers_router_logits_is_refused(make_student, blocks):
    model, _ = make_student()
    batch = blocks.batch(np.arange(2))
    signal = DenseSignal(torch.zeros(2 * 24, 64))
    with pytest.raises(ValueError, match="router logits"):
        DistillationStep(model, EVERYTHING)(batch, signal, StepScale(9, 2))


def test_masters_stay_fp32_and_learn_when_the_model_runs_in_bf16(make_student, blocks):
    model, masters = make_student(gate=0.0, train_router=True, dtype=torch.bfloat16)
    batch = blocks.batch(np.arange(2))
    teacher = SelfTeacher(model, frozen=frozen_routers(model))
    objective = Objective((SourceWeights(1.0, 1.0, 0.0),) * 2)
    output = DistillationStep(model, objective)(batch, teacher.signal(batch), StepScale(20, 2))
    output.loss.backward()
    assert float(output.sums["kd_K"].abs().sum()) == 0.0
    assert {master.grad.dtype for master in masters.values()} == {torch.float32}
    assert all(m.grad.abs().max() > 0 for n, m in masters.items() if n.endswith("output_gate"))


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(make_student, blocks):
    batch = blocks.batch(np.arange(4))
    objective = Objective((SourceWeights(1.0, 1.0, 0.0),) * 2)

    def gradients(checkpointing):
        model, masters = make_student()
        calls = []
        if checkpointing:
            assert recompute_layers(model) == 2
        model.model.layers[0].mlp.router.register_forward_hook(lambda *_: calls.append(1))
        signal = SelfTeacher(model).signal(batch)
        calls.clear()
        DistillationStep(model, objective)(batch, signal, StepScale(50, 4)).loss.backward()
        return len(calls), {name: master.grad for name, master in masters.items()}

    once, plain = gradients(checkpointing=False)
    twice, saved = gradients(checkpointing=True)
    assert (once, twice) == (1, 2)
    for name, gradient in plain.items():
        assert torch.equal(gradient, saved[name])
