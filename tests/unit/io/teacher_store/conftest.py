"""What a teacher says, in float64 over the whole vocabulary, and stores of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

from nexus_cli.io.hashing import sha256_bytes
from nexus_cli.io.location import locate
from nexus_cli.io.teacher_store.id_planes import VocabularyRanks
from nexus_cli.io.teacher_store.manifest import StorePlan
from nexus_cli.io.teacher_store.reader import open_store
from nexus_cli.io.teacher_store.rows import Kept, StoreRows, held_positions
from nexus_cli.io.teacher_store.writer import StoreWriter, ranks_file

# Shape letters: B rows, S positions, M held positions, K kept entries, V vocabulary,
# T temperatures, D samples of the tail, L layers, A experts a token and layer.

TEXT = ("input_ids_BS", "position_ids_BS", "loss_mask_BS", "source_B")


def make_ranks(vocab_size):
    """A table in which the rank says nothing of the id."""
    order_V = np.random.default_rng(vocab_size).permutation(vocab_size)
    return VocabularyRanks(order_V.astype(np.int32))


def make_plan(**changes):
    values = {
        "teacher": "t" * 64,
        "teacher_name": "tiny",
        "tokenizer": "k" * 64,
        "chat_template": None,
        "data": {"sources": ["a", "b"]},
        "data_digest": "d" * 64,
        "sources": ("a", "b"),
        "vocab_size": 50,
        "top_k": 6,
        "top_p": 0.9,
        "min_k": 2,
        "values": "codes",
        "tail_samples": 0,
        "experts": (0, 0),
        "dtype": "float32",
        "compression": "zstd",
        "seq_len": 12,
        "batch_size": 2,
        "requested_steps": 11,
        "num_rows": 22,
        "rows_per_shard": 10,
    } | changes
    values.setdefault("vocab_ranks", sha256_bytes(ranks_file(make_ranks(values["vocab_size"]))))
    return StorePlan(**values)


@dataclass(frozen=True)
class Said:
    """Rows, and the distributions that they were taken from."""

    rows: StoreRows
    probs_MV: np.ndarray  # noqa: N815


def make_rows(plan, seed=0, *, held=0.7, sharpness=3.0):
    """Documents of random lengths, and a teacher that knows every one of ``V`` tokens."""
    rng = np.random.default_rng(seed)
    shape = plan.num_rows, plan.seq_len
    starts_BS = rng.random(shape) < 0.1
    starts_BS[:, 0] = True
    position_ids_BS = np.zeros(shape, np.int32)
    for b, s in np.ndindex(shape):
        position_ids_BS[b, s] = 0 if starts_BS[b, s] else position_ids_BS[b, s - 1] + 1
    mask_BS = rng.random(shape) < held
    input_ids_BS = rng.integers(plan.vocab_size, size=shape).astype(np.int32)
    held_BS = held_positions(mask_BS)
    logits_MV = sharpness * rng.standard_normal((held_BS.sum(), plan.vocab_size))
    probs_MV = np.exp(logits_MV - logits_MV.max(-1, keepdims=True))
    probs_MV /= probs_MV.sum(-1, keepdims=True)
    # The text follows the teacher: most next tokens are kept, some are not.
    cumulative_MV, draw_M1 = probs_MV.cumsum(-1), rng.random((len(probs_MV), 1))
    labels_M = np.minimum((cumulative_MV < draw_M1).sum(-1), plan.vocab_size - 1)
    input_ids_BS[:, 1:][held_BS[:, :-1]] = labels_M
    kept = keep(plan, probs_MV, labels_M, rng)
    source_B = (np.arange(plan.num_rows) % 2).astype(np.int16)
    return Said(StoreRows(input_ids_BS, position_ids_BS, mask_BS, source_B, kept), probs_MV)


def keep(plan, probs_MV, labels_M, rng):
    """The smallest nucleus within the plan's bounds, position by position."""
    num = len(probs_MV)
    ids_MK = np.zeros((num, plan.top_k), np.int32)
    logprobs_MK = np.full((num, plan.top_k), -np.inf, np.float32)
    tails_MT = np.full((num, 3), -np.inf, np.float32)
    samples_MD = np.full((num, plan.tail_samples), -1, np.int32)
    for m, probs_V in enumerate(probs_MV):
        order_V = np.argsort(-probs_V, kind="stable")
        count = plan.top_k
        if plan.top_p < 1:
            reached = int(np.searchsorted(np.cumsum(probs_V[order_V]), plan.top_p)) + 1
            count = min(max(reached, plan.min_k), plan.top_k)
        kept, rest = order_V[:count], order_V[count:]
        ids_MK[m, :count] = kept
        logprobs_MK[m, :count] = np.log(probs_V[kept])
        if len(rest):
            tails_MT[m] = [np.log((probs_V[rest] ** (1 / t)).sum()) for t in (1, 2, 4)]
            samples_MD[m] = rng.choice(rest, plan.tail_samples)
    layers, chosen = plan.experts
    experts_MLA = np.sort(rng.integers(256, size=(num, layers, chosen)), -1).astype(np.uint8)
    return Kept(
        ids_MK=ids_MK,
        logprobs_MK=logprobs_MK,
        tails_MT=tails_MT,
        nll_M=-np.log(probs_MV[np.arange(num), labels_M]).astype(np.float32),
        tail_samples_MD=samples_MD if plan.tail_samples else None,
        experts_MLA=experts_MLA if layers else None,
    )


def take(rows, index_B):
    """The rows ``index_B``, in that order."""
    index_B = np.asarray(index_B, np.int64)
    places = [np.arange(rows.splits[b], rows.splits[b + 1]) for b in index_B]
    place_M = np.concatenate([np.empty(0, np.int64), *places])
    kept = {
        field.name: None if value is None else value[place_M]
        for field in fields(Kept)
        for value in [getattr(rows.kept, field.name)]
    }
    return StoreRows(*(getattr(rows, name)[index_B] for name in TEXT), Kept(**kept))


def write_store(path, plan, rows, shards=None):
    """The shards, written last first; returns what ``finish`` does."""
    writer = StoreWriter(path, plan, make_ranks(plan.vocab_size))
    writer.prepare()
    shards = range(plan.num_shards) if shards is None else shards
    return writer.finish([write_shard_of(writer, rows, shard) for shard in reversed(shards)])


def write_shard_of(writer, rows, shard):
    """In batches, as ``precompute`` does it."""
    span, step = writer.plan.shard_rows(shard), writer.plan.batch_size
    for start in range(span.start, span.stop, step):
        part = range(start, min(start + step, span.stop))
        writer.add(part, take(rows, part))
    return writer.close(shard)


def open_at(path, **expected):
    return open_store(locate(path), **expected)


def assert_same_text(actual, expected):
    for name in TEXT:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), name)
        assert getattr(actual, name).dtype == getattr(expected, name).dtype


def assert_same(actual, expected):
    """Exactly: for float32, and for two readings of the same codes."""
    assert_same_text(actual, expected)
    for field in fields(Kept):
        mine, theirs = getattr(actual.kept, field.name), getattr(expected.kept, field.name)
        assert (mine is None) == (theirs is None), field.name
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs, field.name)
            assert mine.dtype == theirs.dtype, field.name


@pytest.fixture(scope="session")
def stores():
    """The functions of this file, for tests."""
    return SimpleNamespace(
        make_plan=make_plan,
        make_ranks=make_ranks,
        make_rows=make_rows,
        take=take,
        write_store=write_store,
        write_shard_of=write_shard_of,
        open_at=open_at,
        assert_same=assert_same,
        assert_same_text=assert_same_text,
        replace=replace,
    )


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """22 rows in three shards, their plan, and what is read of them: never write to it."""
    path = tmp_path_factory.mktemp("written") / "store"
    plan = make_plan()
    said = make_rows(plan)
    write_store(path, plan, said.rows)
    return SimpleNamespace(path=path, plan=plan, said=said, rows=open_at(path).rows(range(22)))
