import numpy as np
import pytest
import torch

from nexus_cli.core.distill.head import head_loss
from nexus_cli.core.distill.store_teacher import StoreTeacher, stored_batch
from nexus_cli.core.distill.teacher import DenseSignal
from nexus_cli.core.distill.topk import top_k
from nexus_cli.io.teacher_shards import StoreRows
from nexus_cli.io.teacher_store import StorePlan, open_store
from nexus_cli.io.teacher_writer import StoreWriter

# Shape letters: R rows of the store, S positions, H hidden size, V vocabulary, K kept entries.

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


def write_store(path, teacher, k, precision):
    held_N = torch.roll(teacher["mask_RS"], -1, 1)
    held_N[:, -1] = False
    labels_N = torch.roll(teacher["ids_RS"], -1, 1).flatten()
    kept = top_k(teacher["hidden_RSH"].flatten(0, 1), teacher["head_VH"], labels_N, k)
    held_N = held_N.flatten()
    rows = StoreRows(
        input_ids_BS=teacher["ids_RS"].numpy().astype(np.int32),
        position_ids_BS=np.tile(np.arange(S, dtype=np.int32), (R, 1)),
        loss_mask_BS=teacher["mask_RS"].numpy(),
        source_B=np.zeros(R, np.int16),
        ids_BSK=kept.ids_NK.view(R, S, k).numpy().astype(np.int32),
        logprobs_BSK=kept.logprobs_NK.masked_fill(~held_N[:, None], -torch.inf)
        .view(R, S, k)
        .numpy(),
        tail_BS=kept.tail_logprob_N.masked_fill(~held_N, torch.nan).view(R, S).numpy(),
        nll_BS=kept.nll_N.masked_fill(~held_N, 0).view(R, S).numpy(),
    )
    plan = StorePlan(
        teacher="t",
        teacher_name="t",
        tokenizer="k",
        data_digest="d",
        sources=("a",),
        vocab_size=V,
        top_k=k,
        precision=precision,
        dtype="float32",
        compression="zstd",
        seq_len=S,
        batch_size=2,
        requested_steps=3,
        num_rows=R,
        rows_per_shard=4,
    )
    writer = StoreWriter(path, plan)
    writer.prepare()
    spans = [plan.shard_rows(shard) for shard in range(plan.num_shards)]
    writer.finish(
        [writer.write(i, rows.take(slice(span.start, span.stop))) for i, span in enumerate(spans)]
    )
    return open_store(path)


def losses_of(teacher, signal, rows):
    torch.manual_seed(1)
    hidden_NH = teacher["hidden_RSH"][rows].flatten(0, 1) + 0.3 * torch.randn(len(rows) * S, H)
    hidden_NH.requires_grad_()
    labels_N = torch.roll(teacher["ids_RS"][rows], -1, 1).flatten()
    weight_BS = torch.roll(teacher["mask_RS"][rows].float(), -1, 1)
    weight_BS[:, -1] = 0
    weight_N = weight_BS.flatten()
    loss = head_loss(hidden_NH, teacher["head_VH"], labels_N, weight_N, weight_N, signal)
    loss.total.backward()
    return loss, hidden_NH.grad


def test_a_store_of_the_whole_vocabulary_gives_the_loss_of_the_live_teacher(tmp_path, teacher):
    store = write_store(tmp_path, teacher, V, "float32")
    rows = [5, 0, 3]
    batch = stored_batch(store, rows)
    assert torch.equal(batch.input_ids_BS, teacher["ids_RS"][rows])
    assert torch.equal(batch.loss_mask_BS, teacher["mask_RS"][rows])

    stored, stored_grad = losses_of(teacher, StoreTeacher(store).signal(batch), rows)
    live_signal = DenseSignal(teacher["hidden_RSH"][rows].flatten(0, 1))
    live, live_grad = losses_of(teacher, live_signal, rows)

    torch.testing.assert_close(stored.total, live.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(stored.kd_N, live.kd_N, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stored_grad, live_grad, rtol=1e-5, atol=1e-6)


def test_a_short_list_never_exceeds_the_kl_of_the_whole_and_comes_near(tmp_path, teacher):
    store = write_store(tmp_path, teacher, 20, "float16")
    rows = list(range(R))
    stored, _ = losses_of(teacher, StoreTeacher(store).signal(stored_batch(store, rows)), rows)
    live, _ = losses_of(teacher, DenseSignal(teacher["hidden_RSH"].flatten(0, 1)), rows)
    assert (stored.kd_N <= live.kd_N + 1e-3).all()
    assert 0.8 * live.kd_N.sum() < stored.kd_N.sum() < live.kd_N.sum()


def test_counting_a_position_that_is_not_stored_gives_no_number(tmp_path, teacher):
    store = write_store(tmp_path, teacher, 4, "float16")
    signal = StoreTeacher(store).signal(stored_batch(store, [0]))
    ones_N = torch.ones(S)
    loss = head_loss(
        torch.randn(S, H), teacher["head_VH"], torch.zeros(S).long(), ones_N, ones_N, signal
    )
    assert loss.total.isnan()


def test_a_batch_of_other_text_is_refused(tmp_path, teacher):
    store = write_store(tmp_path, teacher, 4, "float16")
    batch = stored_batch(store, [0, 1])
    batch.index_B[0] = 2
    with pytest.raises(ValueError, match="other tokens"):
        StoreTeacher(store).signal(batch)
