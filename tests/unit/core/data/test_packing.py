import numpy as np
import pytest

from nexus_cli.core.data import packing
from nexus_cli.core.data.document import TokenizedDocument
from nexus_cli.core.data.errors import UnusableRowError
from nexus_cli.core.data.packing import Piece, cut, pack

PAD, SEQ_LEN = 0, 32


def pieces(seed, count=200, longest=SEQ_LEN):
    """Pieces whose tokens are all different, so that each can be found again."""
    rng = np.random.default_rng(seed)
    made, token = [], 1
    for length in rng.integers(2, longest + 1, size=count):
        targets = rng.random(length) < 0.7
        targets[0] = False
        made.append(Piece(np.arange(token, token + length, dtype=np.int32), targets))
        token += length
    return made


def document(length, *, is_chat, targets=None):
    mask = np.ones(length, np.bool_) if targets is None else np.isin(np.arange(length), targets)
    mask[0] = False
    ids = np.arange(1, length + 1, dtype=np.int32)
    return TokenizedDocument(ids, mask, np.zeros(length, np.bool_), length, 0, "0" * 64, is_chat)


@pytest.fixture(params=[5, 64, 1024])
def window(request, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", request.param)


@pytest.mark.usefixtures("window")
def test_every_token_is_packed_once_with_its_mask_and_in_its_document():
    given = pieces(0)
    blocks = list(pack(given, SEQ_LEN, PAD))
    spans = []
    for block in blocks:
        starts = np.flatnonzero(block.position_ids == 0)
        for start, end in zip(starts, [*starts[1:], SEQ_LEN], strict=True):
            assert (block.position_ids[start:end] == np.arange(end - start)).all()
            if block.input_ids[start] != PAD:
                spans.append((block.input_ids[start:end], block.loss_mask[start:end]))
    spans.sort(key=lambda span: span[0][0])
    assert len(spans) == len(given)
    for piece, (ids, targets) in zip(given, spans, strict=True):
        assert (ids == piece.input_ids).all()
        assert (targets == piece.loss_mask).all()


@pytest.mark.usefixtures("window")
def test_no_first_token_and_no_padding_is_a_target():
    for block in pack(pieces(1), SEQ_LEN, PAD):
        assert not block.loss_mask[block.position_ids == 0].any()
        assert not block.loss_mask[block.input_ids == PAD].any()
        assert (block.input_ids[block.used :] == PAD).all()
        assert (block.input_ids[: block.used] != PAD).all()


def test_short_documents_fill_the_blocks():
    given = pieces(2, count=3000, longest=16)
    blocks = list(pack(given, SEQ_LEN, PAD))
    assert sum(map(len, given)) / (len(blocks) * SEQ_LEN) > 0.99


def test_the_packing_depends_on_the_pieces_alone():
    first, second = (list(pack(iter(pieces(3)), SEQ_LEN, PAD)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert (one.input_ids == other.input_ids).all()


def test_pieces_that_fill_no_block_leave_all_the_same(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 4)
    long = [Piece(np.ones(20, np.int32), np.zeros(20, np.bool_)) for _ in range(20)]
    assert len(list(pack(long, SEQ_LEN, PAD))) == 20


def test_plain_text_is_cut_into_windows_that_each_lose_one_target():
    cuts = cut(document(70, is_chat=False), SEQ_LEN)
    assert [len(piece) for piece in cuts] == [32, 32, 6]
    assert (np.concatenate([piece.input_ids for piece in cuts]) == np.arange(1, 71)).all()
    assert [int(piece.loss_mask.sum()) for piece in cuts] == [31, 31, 5]


def test_a_window_of_one_token_has_no_target_and_is_left_out():
    assert [len(piece) for piece in cut(document(33, is_chat=False), SEQ_LEN)] == [32]


def test_a_conversation_keeps_its_head():
    (piece,) = cut(document(70, is_chat=True, targets=[10, 11, 60]), SEQ_LEN)
    assert len(piece) == SEQ_LEN
    assert np.flatnonzero(piece.loss_mask).tolist() == [10, 11]


def test_a_conversation_whose_answers_do_not_fit_is_left_out():
    with pytest.raises(UnusableRowError, match="within the first"):
        cut(document(70, is_chat=True, targets=[60]), SEQ_LEN)


def test_a_piece_longer_than_a_block_is_refused():
    long = Piece(np.ones(33, np.int32), np.ones(33, np.bool_))
    with pytest.raises(ValueError, match="longer than 32"):
        list(pack([long], SEQ_LEN, PAD))
