import math

import numpy as np
import pytest
import torch

from nexus_cli.core.distill.head import head_loss
from nexus_cli.core.distill.store_teacher import StoreTeacher, stored_batch
from nexus_cli.core.distill.teacher import DenseSignal
from nexus_cli.core.distill.topk import top_k
from nexus_cli.io.hashing import sha256_bytes
from nexus_cli.io.location import locate
from nexus_cli.io.teacher_store.id_planes import VocabularyRanks
from nexus_cli.io.teacher_store.manifest import StorePlan
from nexus_cli.io.teacher_store.reader import open_store
from nexus_cli.io.teacher_store.rows import Kept, StoreRows, held_positions
from nexus_cli.io.teacher_store.writer import StoreWriter, ranks_file

# Shape letters: R rows of the store, S positions, H hidden size, V vocabulary, K kept entries,
# M positions whose next token is a target.

R, S, H, V = 6, 9, 8, 40


@pytest.fixture(scope="module")
def teacher():
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_RSH": torch.randn(R, S, H, generator=generator),
        "head_VH": torch.randn(V, H, generator=generator),
        "ids_RS": torch.randint(V, (R, S), generator=generator),
        "mask_RS": torch.rand(R, S, generator=generator) < 0.8,
    }


@pytest.fixture
def write(tmp_path, teacher):
    """A store of the teacher, and the teacher that speaks from it."""

    def make(k, values, top_p=1.0, min_k=1):
        mask_RS = teacher["mask_RS"].numpy()
        held_RS = held_positions(mask_RS)
        hidden_MH = teacher["hidden_RSH"][torch.from_numpy(held_RS)]
        labels_M = torch.roll(teacher["ids_RS"], -1, 1)[torch.from_numpy(held_RS)]
        kept = top_k(hidden_MH, teacher["head_VH"], labels_M, k, top_p=top_p, min_k=min_k)
        rows = StoreRows(
            input_ids_BS=teacher["ids_RS"].numpy().astype(np.int32),
            position_ids_BS=np.tile(np.arange(S, dtype=np.int32), (R, 1)),
            loss_mask_BS=mask_RS,
            source_B=np.zeros(R, np.int16),
            kept=Kept(
                ids_MK=kept.ids_NK.numpy().astype(np.int32),
                logprobs_MK=kept.logprobs_NK.numpy(),
                tails_MT=kept.tails_NT.numpy(),
                nll_M=kept.nll_N.numpy(),
            ),
        )
        ranks = VocabularyRanks(np.arange(V, dtype=np.int32)[::-1].copy())
        plan = StorePlan(
            teacher="t",
            teacher_name="t",
            tokenizer="k",
            chat_template=None,
            data={},
            data_digest="d",
            sources=("a",),
            vocab_size=V,
            vocab_ranks=sha256_bytes(ranks_file(ranks)),
            top_k=k,
            top_p=top_p,
            min_k=min_k,
            values=values,
            tail_samples=0,
            experts=(0, 0),
            dtype="float32",
            compression="zstd",
            seq_len=S,
            batch_size=2,
            requested_steps=3,
            num_rows=R,
            rows_per_shard=R,
        )
        writer = StoreWriter(tmp_path, plan, ranks)
        writer.prepare()
        writer.add(range(R), rows)
        writer.finish([writer.close(0)])
        store = open_store(locate(tmp_path))
        return store, StoreTeacher(store, dense=store.dense)

    return make


def weights_of(teacher, rows):
    weight_BS = torch.roll(teacher["mask_RS"][rows].float(), -1, 1)
    weight_BS[:, -1] = 0
    return weight_BS.flatten()


def student_of(teacher, rows):
    generator = torch.Generator().manual_seed(1)
    noise_NH = torch.randn(len(rows) * S, H, generator=generator)
    return teacher["hidden_RSH"][rows].flatten(0, 1) + 0.3 * noise_NH


def losses_of(teacher, signal, rows, temperature=1.0):
    hidden_NH = student_of(teacher, rows).requires_grad_()
    labels_N = torch.roll(teacher["ids_RS"][rows], -1, 1).flatten()
    weight_N = weights_of(teacher, rows)
    loss = head_loss(
        hidden_NH,
        teacher["head_VH"],
        labels_N,
        weight_N,
        weight_N,
        signal,
        temperature=temperature,
    )
    loss.total.backward()
    return loss, hidden_NH.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 1.5])
def test_a_store_of_the_whole_vocabulary_gives_the_loss_of_the_live_teacher(
    write, teacher, temperature
):
    store, stored_teacher = write(V, "float32")
    rows = [5, 0, 3]
    batch = stored_batch(store, rows)
    assert torch.equal(batch.input_ids_BS, teacher["ids_RS"][rows])
    assert torch.equal(batch.loss_mask_BS, teacher["mask_RS"][rows])
    assert batch.index_B.tolist() == rows

    stored, stored_grad = losses_of(teacher, stored_teacher.signal(batch), rows, temperature)
    live_signal = DenseSignal(teacher["hidden_RSH"][rows].flatten(0, 1))
    live, live_grad = losses_of(teacher, live_signal, rows, temperature)

    assert live.kd_N.sum() > 1
    torch.testing.assert_close(stored.total, live.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(stored.kd_N, live.kd_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stored_grad, live_grad, rtol=1e-5, atol=1e-5)


def bucketed_kl(teacher_V, student_V, kept, temperature):
    """``T^2 KL`` over the kept tokens and one bucket of all others, of logits in float64."""
    p_V, q_V = (
        np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
        for logits_V in (teacher_V, student_V)
    )
    rest = sorted(set(range(V)) - set(kept))
    total = sum(p_V[i] * math.log(p_V[i] / q_V[i]) for i in kept)
    if rest:
        total += p_V[rest].sum() * math.log(p_V[rest].sum() / q_V[rest].sum())
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize(("values", "tolerance"), [("float32", 1e-5), ("codes", 0.04)])
def test_a_nucleus_gives_the_bucketed_kl_at_every_stored_temperature(
    write, teacher, temperature, values, tolerance
):
    store, stored_teacher = write(12, values, top_p=0.9, min_k=2)
    rows = list(range(R))
    signal = stored_teacher.signal(stored_batch(store, rows))
    loss, _ = losses_of(teacher, signal, rows, float(temperature))
    head_VH = teacher["head_VH"].double().numpy()
    theirs_NV = teacher["hidden_RSH"].flatten(0, 1).double().numpy() @ head_VH.T
    mine_NV = student_of(teacher, rows).double().numpy() @ head_VH.T
    counts, expected_N = set(), np.zeros(R * S)
    for n in weights_of(teacher, rows).nonzero()[:, 0].tolist():
        p_V = np.exp(theirs_NV[n]) / np.exp(theirs_NV[n]).sum()
        order = np.argsort(-p_V).tolist()
        count = next(i for i in range(1, 13) if i == 12 or (i > 1 and p_V[order[:i]].sum() >= 0.9))
        expected_N[n] = bucketed_kl(theirs_NV[n], mine_NV[n], order[:count], temperature)
        counts.add(count)
    assert len(counts) > 3, "positions keep different numbers"
    np.testing.assert_allclose(loss.kd_N.numpy(), expected_N, rtol=tolerance, atol=tolerance)


def test_a_short_list_in_codes_comes_near_the_kl_of_the_whole(write, teacher):
    store, stored_teacher = write(20, "codes")
    rows = list(range(R))
    stored, _ = losses_of(teacher, stored_teacher.signal(stored_batch(store, rows)), rows)
    live, _ = losses_of(teacher, DenseSignal(teacher["hidden_RSH"].flatten(0, 1)), rows)
    assert (stored.kd_N <= live.kd_N + 0.02).all()
    assert 0.8 * live.kd_N.sum() < stored.kd_N.sum() < live.kd_N.sum()


def test_positions_that_are_not_held_use_no_entry_and_counting_them_gives_no_number(write, teacher):
    store, stored_teacher = write(4, "codes")
    signal = stored_teacher.signal(stored_batch(store, [0]))
    held_N = weights_of(teacher, [0]) > 0
    assert 0 < held_N.sum() < S
    assert torch.isneginf(signal.logprobs_NK[~held_N]).all()
    assert signal.tails_NT[~held_N].isnan().all()
    assert signal.tails_NT[held_N].isfinite().all()
    for temperature in (1.0, 2.0, 4.0):
        for counted_N, expected in ((held_N.float(), False), (torch.ones(S), True)):
            loss = head_loss(
                torch.randn(S, H),
                teacher["head_VH"],
                torch.zeros(S).long(),
                counted_N,
                counted_N,
                signal,
                temperature=temperature,
            )
            assert bool(loss.total.isnan()) == expected


def test_another_temperature_of_a_short_list_is_refused(write, teacher):
    store, stored_teacher = write(4, "codes")
    signal = stored_teacher.signal(stored_batch(store, [0]))
    with pytest.raises(ValueError, match="not at 3"):
        losses_of(teacher, signal, [0], 3.0)


def test_a_batch_of_other_text_is_refused(write):
    store, stored_teacher = write(4, "codes")
    batch = stored_batch(store, [0, 1])
    batch.index_B[0] = 2
    with pytest.raises(ValueError, match="other tokens"):
        stored_teacher.signal(batch)
