"""What goes into columns comes out of them; and the columns are what the documentation says."""

import math
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nexus_cli.io.teacher_store.columns import Codec

# Shape letters: B rows, S positions, M held positions, K kept entries, V vocabulary,
# T temperatures of the tail.

EXTRAS = {"tail_samples": 3, "experts": (2, 4)}
TEXT_COLUMNS = {
    "seq": "int64",
    "source": "int16",
    "starts": "binary",
    "loss_mask": "binary",
    "label": "binary",
    "text_page": "binary",
    "text_low": "binary",
    "text_far_low": "binary",
    "text_far_high": "binary",
}
ID_COLUMNS = dict.fromkeys(["id_page", "id_low", "id_far_low", "id_far_high"], "binary")
CODES = [
    "ratio_1",
    "ratio_2",
    "ratio_4",
    "tail_1_low",
    "tail_1_high",
    "tail_2_low",
    "tail_2_high",
    "tail_4_low",
]
CODE_COLUMNS = dict.fromkeys([*CODES, "tail_4_high", "nll_low", "nll_high"], "binary")
FLOAT_COLUMNS = dict.fromkeys(["logprob", "tail_1", "tail_2", "tail_4", "nll"], "binary")
SAMPLES = ["sampled", "sample_page", "sample_low", "sample_far_low", "sample_far_high"]
SAMPLE_COLUMNS = dict.fromkeys(SAMPLES, "binary")


def codec_of(stores, plan):
    return Codec(plan.layout, stores.make_ranks(plan.vocab_size))


def round_trip(stores, plan, rows):
    codec = codec_of(stores, plan)
    return codec.decode(codec.encode(rows, np.arange(len(rows))))


def used(kept):
    return np.isfinite(kept.logprobs_MK)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, TEXT_COLUMNS | {"k": "binary"} | ID_COLUMNS | CODE_COLUMNS),
        ({"top_p": 1.0}, TEXT_COLUMNS | ID_COLUMNS | CODE_COLUMNS),
        ({"values": "float32"}, TEXT_COLUMNS | {"k": "binary"} | ID_COLUMNS | FLOAT_COLUMNS),
        (
            EXTRAS,
            TEXT_COLUMNS
            | {"k": "binary"}
            | ID_COLUMNS
            | CODE_COLUMNS
            | SAMPLE_COLUMNS
            | {"experts": "binary"},
        ),
    ],
    ids=["variable", "fixed", "float32", "extras"],
)
def test_columns_have_these_names_and_types(stores, tmp_path, changes, expected):
    plan = stores.make_plan(**changes)
    stores.write_store(tmp_path, plan, stores.make_rows(plan).rows)
    schema = pq.read_schema(tmp_path / "shards" / "00000.parquet")
    assert {field.name: str(field.type) for field in schema} == expected


LAYOUTS = {
    "variable": {},
    "fixed": {"top_p": 1.0},
    "one entry": {"top_k": 1, "min_k": 1},
    "one entry always": {"top_k": 1, "min_k": 1, "top_p": 1.0},
    "whole vocabulary": {"top_k": 50, "top_p": 1.0},
    "255 entries": {"vocab_size": 260, "top_k": 255, "top_p": 1.0, "seq_len": 60},
    "256 entries": {"vocab_size": 260, "top_k": 256, "top_p": 1.0, "seq_len": 60},
    "extras": EXTRAS,
    "8,256 tokens, over 255 of them kept": {
        "vocab_size": 8_256,
        "top_k": 300,
        "top_p": 0.97,
        "num_rows": 3,
        "tail_samples": 2,
    },
    "201,088 tokens": {"vocab_size": 201_088, "num_rows": 3, "top_k": 32} | EXTRAS,
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_in_float32_come_back_exactly(stores, changes):
    plan = stores.make_plan(values="float32", **changes)
    rows = stores.make_rows(plan).rows
    assert len(rows.kept) > 5
    stores.assert_same(round_trip(stores, plan, rows), rows)


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_in_codes_come_back_within_a_step(stores, changes):
    plan = stores.make_plan(**changes)
    rows = stores.make_rows(plan).rows
    read = round_trip(stores, plan, rows)
    stores.assert_same_text(read, rows)
    mine, theirs = read.kept, rows.kept
    for name in ("ids_MK", "tail_samples_MD", "experts_MLA"):
        if getattr(theirs, name) is not None:
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
    assert np.array_equal(used(mine), used(theirs))
    # Of a next token that is kept, as the entry says; else to 1/128 of it.
    assert (np.abs(mine.nll_M - theirs.nll_M) <= np.maximum(1 / 16, theirs.nll_M / 120)).all()

    total_M = np.exp(mine.logprobs_MK, dtype=np.float64).sum(1)
    total_M += np.exp(mine.tails_MT[:, 0], dtype=np.float64)
    np.testing.assert_allclose(total_M, 1, rtol=0, atol=1e-6)

    # The step is 1/16: half of it for the entry, as much for the sum that it is divided by.
    near_MK = used(theirs) & (theirs.logprobs_MK > theirs.logprobs_MK[:, :1] - 15.9)
    error_MK = np.abs(mine.logprobs_MK[near_MK] - theirs.logprobs_MK[near_MK])
    assert error_MK.max() <= 1 / 16 + 1e-5

    assert np.array_equal(np.isneginf(mine.tails_MT), np.isneginf(theirs.tails_MT))
    for column, temperature in enumerate((1, 2, 4)):
        ratios = [k.tails_MT[:, column] - k.logprobs_MK[:, 0] / temperature for k in (mine, theirs)]
        held_M = np.isfinite(ratios[1]) & (ratios[1] > (-11.9, -3.9, -1.9)[column])
        np.testing.assert_allclose(ratios[0][held_M], ratios[1][held_M], rtol=0, atol=1 / 32 + 1e-5)


def test_codes_add_less_than_a_ten_thousandth_nat_of_kl_on_average(stores):
    plan = stores.make_plan(vocab_size=8_256, top_k=32, min_k=4, top_p=0.98, seq_len=40, num_rows=8)
    said = stores.make_rows(plan, sharpness=5.0)
    read = round_trip(stores, plan, said.rows).kept
    entropies, divergences = [], []
    for m, probs_V in enumerate(said.probs_MV):
        count = int(used(said.rows.kept)[m].sum())
        ids = said.rows.kept.ids_MK[m, :count]
        true = [*probs_V[ids], 1 - probs_V[ids].sum()]
        said_of = [*np.exp(read.logprobs_MK[m, :count]), np.exp(read.tails_MT[m, 0])]
        pairs = [(p, float(q)) for p, q in zip(true, said_of, strict=True)]
        divergences.append(sum(p * math.log(p / q) for p, q in pairs))
        entropies.append(-(probs_V * np.log(probs_V)).sum())
    assert 1.5 < np.mean(entropies) < 2.6, "about that of real text"
    assert 0 < np.mean(divergences) < 1e-4


def test_the_mean_nll_of_codes_is_that_of_the_teacher(stores):
    plan = stores.make_plan(vocab_size=300, top_k=32, top_p=0.95, seq_len=400, num_rows=50)
    rows = stores.make_rows(plan, held=1.0).rows
    read_M = round_trip(stores, plan, rows).kept.nll_M
    is_kept_M = (rows.kept.ids_MK == rows.input_ids_BS[:, 1:].reshape(-1, 1)).any(1)
    for part_M in (is_kept_M, ~is_kept_M):
        assert part_M.sum() > 500
        mean = rows.kept.nll_M[part_M].mean(dtype=np.float64)
        assert read_M[part_M].mean(dtype=np.float64) == pytest.approx(mean, abs=1e-3)


def test_rows_without_a_held_position_hold_text_alone(stores):
    plan = stores.make_plan(**EXTRAS)
    for held in (0.0, 0.05):  # none in any row, none in some
        rows = stores.make_rows(plan, held=held).rows
        assert (np.diff(rows.splits) == 0).any()
        read = round_trip(stores, plan, rows)
        stores.assert_same_text(read, rows)
        assert np.array_equal(read.kept.ids_MK, rows.kept.ids_MK)
        assert read.kept.tails_MT.shape == (len(rows.kept), 3)


@pytest.mark.parametrize("top_k", [255, 256, 257])
@pytest.mark.parametrize("top_p", [1.0, 0.99999])
def test_a_next_token_that_is_the_last_entry_is_kept(stores, top_k, top_p):
    """255 and 65,535 stand for a next token that is not kept."""
    plan = stores.make_plan(vocab_size=260, top_k=top_k, top_p=top_p, values="float32")
    rows = stores.make_rows(plan, held=1.0, sharpness=0.01).rows
    kept, last_M = rows.kept, np.isfinite(rows.kept.logprobs_MK).sum(1) - 1
    assert last_M.max() == top_k - 1
    last_M1 = last_M[:, None]
    tokens_BS = rows.input_ids_BS.copy()
    tokens_BS[:, 1:] = np.take_along_axis(kept.ids_MK, last_M1, 1).reshape(22, 11)
    nll_M = -np.take_along_axis(kept.logprobs_MK, last_M1, 1)[:, 0]
    rows = stores.replace(rows, input_ids_BS=tokens_BS, kept=stores.replace(kept, nll_M=nll_M))
    stores.assert_same(round_trip(stores, plan, rows), rows)


@pytest.mark.parametrize("seed", range(12))
def test_any_rows_come_back(stores, seed):
    """Sizes and settings drawn at random."""
    rng = np.random.default_rng(1000 + seed)
    vocab_size = int(rng.choice([2, 50, 300]))
    top_k = int(rng.integers(1, vocab_size + 1))
    plan = stores.make_plan(
        vocab_size=vocab_size,
        top_k=top_k,
        min_k=int(rng.integers(1, top_k + 1)),
        top_p=float(rng.choice([1.0, 0.5, 0.9, 0.999])),
        values=str(rng.choice(["codes", "float32"])),
        tail_samples=int(rng.integers(3)),
        experts=tuple(rng.integers(1, 4, 2).tolist()) if rng.random() < 0.5 else (0, 0),
        seq_len=int(rng.integers(1, 30)),
        num_rows=int(rng.integers(1, 9)),
    )
    rows = stores.make_rows(plan, seed, held=rng.random(), sharpness=rng.uniform(0, 6)).rows
    read = round_trip(stores, plan, rows)
    if plan.values == "float32":
        stores.assert_same(read, rows)
    stores.assert_same_text(read, rows)
    assert np.array_equal(read.kept.ids_MK, rows.kept.ids_MK)
    assert np.array_equal(used(read.kept), used(rows.kept))
    total_M = np.exp(read.kept.logprobs_MK, dtype=np.float64).sum(1)
    total_M += np.exp(read.kept.tails_MT[:, 0], dtype=np.float64)
    np.testing.assert_allclose(total_M, 1, rtol=0, atol=1e-6)


def bits(data, count):
    return [bool(data[i // 8] >> (7 - i % 8) & 1) for i in range(count)]


def plain_ids(record, name, id_V):
    """Ids of one row, from its four planes."""
    far = iter(zip(record[f"{name}_far_low"], record[f"{name}_far_high"], strict=True))
    ids = []
    for page, low in zip(record[f"{name}_page"], record[f"{name}_low"], strict=True):
        far_low, far_high = next(far) if page == 255 else (0, 0)
        ids.append(int(id_V[256 * (page + far_low + 256 * far_high) + low]))
    assert next(far, None) is None
    return ids


def sixteen(record, name):
    pairs = zip(record[f"{name}_low"], record[f"{name}_high"], strict=True)
    return [low + 256 * high for low, high in pairs]


def numbers(data, width):
    return list(struct.unpack(f"<{len(data) // struct.calcsize(width)}{width}", data))


def plain_entries(record, counts, id_V, top_k):
    """Kept ids and codes of every held position."""
    ids = iter(plain_ids(record, "id", id_V))
    octaves = {
        place: iter(record[f"ratio_{place}"])
        for place in (2**i for i in range(top_k))
        if place < top_k
    }
    for count in counts:
        codes = [0]
        for place in range(1, count):
            octave = 2 ** (place.bit_length() - 1)
            codes.append(codes[-1] + next(octaves[octave]))
        yield [next(ids) for _ in codes], codes
    assert next(ids, None) is None
    assert [next(rest, None) for rest in octaves.values()] == [None] * len(octaves)


def plain_row(record, id_V, seq_len, top_k, num_samples, num_experts):
    """A row decoded one number at a time: what another program needs to know of the format."""
    width = "B" if top_k < 256 else "H"
    not_kept = 255 if top_k < 256 else 65_535
    positions, mask = [], bits(record["loss_mask"], seq_len)
    for start in bits(record["starts"], seq_len):
        positions.append(0 if start or not positions else positions[-1] + 1)
    held_at = [t for t in range(seq_len - 1) if mask[t + 1]]
    counts, labels = numbers(record["k"], width), numbers(record["label"], width)
    assert len(counts) == len(labels) == len(held_at)
    tails = [sixteen(record, f"tail_{temperature}") for temperature in (1, 2, 4)]
    drawn, nll = iter(plain_ids(record, "sample", id_V)), iter(sixteen(record, "nll"))
    known, held = {}, []
    for m, (ids, codes) in enumerate(plain_entries(record, counts, id_V, top_k)):
        ratios = [math.exp(-code / 16) for code in codes]
        tail = math.exp(tails[0][m] / 16 - 12) if tails[0][m] else 0.0
        whole = sum(ratios) + tail
        probs = [ratio / whole for ratio in ratios]
        if labels[m] == not_kept:
            said = struct.unpack("<e", struct.pack("<H", next(nll)))[0]
        else:
            said = -math.log(probs[labels[m]])
            known[held_at[m] + 1] = ids[labels[m]]
        held.append(
            {
                "ids": ids,
                "probs": probs,
                "nll": said,
                "tails": [
                    code[m] / 16 - offset - math.log(whole) / temperature if code[m] else -math.inf
                    for code, offset, temperature in zip(tails, (12, 4, 2), (1, 2, 4), strict=True)
                ],
                "samples": [
                    next(drawn) if record["sampled"][m] else -1 for _ in range(num_samples)
                ],
                "experts": list(record["experts"][m * num_experts : (m + 1) * num_experts]),
            }
        )
    others = iter(plain_ids(record, "text", id_V))
    tokens = [known[t] if t in known else next(others) for t in range(seq_len)]
    assert next(others, None) is next(drawn, None) is next(nll, None) is None
    return tokens, positions, mask, held


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 201_088, "top_k": 32, "num_rows": 4, "rows_per_shard": 4},
        {"vocab_size": 300, "top_k": 300, "top_p": 0.98, "num_rows": 4, "rows_per_shard": 4},
        {"vocab_size": 6, "top_k": 6, "top_p": 0.999, "num_rows": 4, "rows_per_shard": 4},
    ],
    ids=["far ids", "counts of two bytes", "positions without a tail"],
)
def test_a_plain_reader_of_the_documented_columns_reads_the_same(stores, tmp_path, changes):
    plan = stores.make_plan(**changes, **EXTRAS)
    said = stores.make_rows(plan)
    stores.write_store(tmp_path, plan, said.rows)
    rows = stores.open_at(tmp_path).rows(range(4))
    id_V = np.load(tmp_path / "vocab_rank.npy")
    assert id_V.dtype == np.dtype("<i4")
    records = pq.read_table(tmp_path / "shards" / "00000.parquet").to_pylist()
    assert [record["seq"] for record in records] == [0, 1, 2, 3]
    no_tail = 0
    for b, record in enumerate(records):
        ids, positions, mask, held = plain_row(record, id_V, plan.seq_len, plan.top_k, 3, 8)
        assert ids == rows.input_ids_BS[b].tolist() == said.rows.input_ids_BS[b].tolist()
        assert positions == rows.position_ids_BS[b].tolist()
        assert mask == rows.loss_mask_BS[b].tolist()
        assert record["source"] == rows.source_B[b]
        kept = stores.take(rows, [b]).kept
        assert len(held) == len(kept)
        assert kept.nll_M.tolist() == pytest.approx([plain["nll"] for plain in held], abs=1e-5)
        for m, plain in enumerate(held):
            count = len(plain["ids"])
            assert plain["ids"] == kept.ids_MK[m, :count].tolist()
            assert np.exp(kept.logprobs_MK[m, :count]) == pytest.approx(plain["probs"], rel=1e-5)
            assert np.isneginf(kept.logprobs_MK[m, count:]).all()
            assert kept.tails_MT[m].tolist() == pytest.approx(plain["tails"], abs=1e-5)
            assert plain["samples"] == kept.tail_samples_MD[m].tolist()
            assert plain["experts"] == kept.experts_MLA[m].reshape(-1).tolist()
            no_tail += plain["tails"][0] == -math.inf
    assert (no_tail > 0) == (plan.vocab_size == 6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"position_ids_BS": np.full((22, 12), 3, np.int32)}, "start at 0"),
        ({"kept": {"logprobs_MK": "less"}}, "entries for"),
        ({"kept": {"tail_samples_MD": None}}, "samples of the tail"),
        ({"kept": {"experts_MLA": None}}, "has experts"),
    ],
)
def test_rows_that_are_not_of_the_layout_are_no_columns(stores, change, complaint):
    plan = stores.make_plan(**EXTRAS)
    rows = stores.make_rows(plan).rows
    kept = change.pop("kept", {})
    if kept.get("logprobs_MK"):
        kept = {"ids_MK": rows.kept.ids_MK[:, :-1], "logprobs_MK": rows.kept.logprobs_MK[:, :-1]}
    rows = stores.replace(rows, kept=stores.replace(rows.kept, **kept), **change)
    with pytest.raises(ValueError, match=complaint):
        codec_of(stores, plan).encode(rows, np.arange(22))


def test_a_fixed_layout_takes_no_position_with_fewer_entries(stores):
    variable, fixed = stores.make_plan(), stores.make_plan(top_p=1.0)
    with pytest.raises(ValueError, match="fewer entries"):
        codec_of(stores, fixed).encode(stores.make_rows(variable).rows, np.arange(22))


def test_columns_that_do_not_fit_each_other_are_no_rows(stores):
    plan = stores.make_plan(**EXTRAS)
    codec = codec_of(stores, plan)
    table = codec.encode(stores.make_rows(plan).rows, np.arange(22))
    for name in table.column_names:
        if name in ("seq", "source"):
            continue
        values = table.column(name).to_pylist()
        values[3] += b"\x00"
        place = table.column_names.index(name)
        longer = table.set_column(place, name, pa.array(values, pa.binary()))
        with pytest.raises((ValueError, IndexError)):
            codec.decode(longer)


def test_a_next_token_whose_code_has_reached_its_end_keeps_its_own_nll(stores):
    """Kept entries may lie further below the likeliest than a code can say."""
    plan = stores.make_plan(top_k=50, top_p=1.0, num_rows=40)
    said = stores.make_rows(plan, sharpness=30.0)
    kept = said.rows.kept
    far_M = kept.nll_M + kept.logprobs_MK[:, 0] > 16
    labels_M = said.rows.input_ids_BS[:, 1:][said.rows.held_BS[:, :-1]]
    if not far_M.any():  # the text follows the teacher: take an unlikely token by hand
        labels_M[0] = kept.ids_MK[0, -1]
        said.rows.input_ids_BS[:, 1:][said.rows.held_BS[:, :-1]] = labels_M
        kept.nll_M[0] = -kept.logprobs_MK[0, -1]
    codec = Codec(plan.layout, stores.make_ranks(50))
    read = codec.decode(codec.encode(said.rows, np.arange(40)))
    np.testing.assert_array_equal(read.input_ids_BS, said.rows.input_ids_BS)
    far_M = kept.nll_M + kept.logprobs_MK[:, 0] > 16
    assert far_M.any()
    np.testing.assert_allclose(read.kept.nll_M[far_M], kept.nll_M[far_M], rtol=1 / 128)
