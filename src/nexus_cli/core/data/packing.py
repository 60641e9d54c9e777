"""Documents into sequences of one length: cut where too long, packed where short."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus_cli.core.data.document import TokenizedDocument
from nexus_cli.core.data.errors import UnusableRowError

# Shape letters in this file: T tokens of a piece, S tokens of a block.

WINDOW = 1024  # pieces that are packed together
FULL = 0.95  # a block filled below this waits for the next window's pieces

NOT_IN_SEQ_LEN = "no assistant token within the first seq_len tokens"


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document that share a sequence, a segment of their own.

    Attributes:
        input_ids: int32 ``[T]``.
        loss_mask: bool ``[T]``, False at its first token.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Block:
    """One packed sequence.

    Attributes:
        input_ids: int32 ``[S]``.
        position_ids: int32 ``[S]``, from 0 in every piece and in the padding.
        loss_mask: bool ``[S]``, False at the first token of a piece and on padding.
        used: positions that hold text.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    used: int


def cut(document: TokenizedDocument, seq_len: int) -> list[Piece]:
    """Make a document fit.

    Plain text is cut into consecutive windows. A conversation keeps its head, for what comes
    later makes no sense without the tools and the turns before it.

    Args:
        document: of any length.
        seq_len: tokens a sequence.

    Returns:
        Pieces of at most ``seq_len`` tokens, each with a target.

    Raises:
        UnusableRowError: no piece has a target.
    """
    last = seq_len if document.is_chat else len(document)
    pieces = []
    for start in range(0, last, seq_len):
        targets = document.loss_mask[start : start + seq_len].copy()
        targets[:1] = False
        if targets.any():
            pieces.append(Piece(document.input_ids[start : start + seq_len], targets))
    if not pieces:
        raise UnusableRowError(NOT_IN_SEQ_LEN)
    return pieces


def pack(pieces: Iterable[Piece], seq_len: int, pad_id: int) -> Iterator[Block]:
    """Pack pieces of one source, first-fit decreasing within a bounded window.

    The result depends on the pieces and their order alone. Blocks that a window leaves partly
    empty are packed anew with the next.

    Args:
        pieces: each of at most ``seq_len`` tokens.
        seq_len: tokens a block.
        pad_id: fills up a block.
    """
    waiting: list[Piece] = []
    for piece in pieces:
        waiting.append(piece)
        if len(waiting) < WINDOW:
            continue
        bins = first_fit_decreasing(waiting, seq_len)
        fits = [sum(map(len, held)) >= FULL * seq_len for held in bins]
        if not any(fits):  # something must leave, or the window never moves on
            fits = [True] * len(bins)
        waiting = [p for held, fit in zip(bins, fits, strict=True) if not fit for p in held]
        done = (held for held, fit in zip(bins, fits, strict=True) if fit)
        yield from (_block(held, seq_len, pad_id) for held in done)
    yield from (_block(held, seq_len, pad_id) for held in first_fit_decreasing(waiting, seq_len))


def first_fit_decreasing(pieces: list[Piece], seq_len: int) -> list[list[Piece]]:
    """Put the longest piece first into the first bin that has room for it.

    Args:
        pieces: equal lengths keep their order.
        seq_len: room of a bin.
    """
    bins: list[list[Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=len, reverse=True):
        if len(piece) > seq_len:
            raise ValueError(f"a piece of {len(piece)} tokens, longer than {seq_len}")
        place = next((i for i, left in enumerate(room) if left >= len(piece)), None)
        if place is None:
            bins.append([piece])
            room.append(seq_len - len(piece))
        else:
            bins[place].append(piece)
            room[place] -= len(piece)
    return bins


def _block(pieces: list[Piece], seq_len: int, pad_id: int) -> Block:
    used = sum(map(len, pieces))
    lengths = [*map(len, pieces), seq_len - used]
    return Block(
        input_ids=np.concatenate(
            [*(piece.input_ids for piece in pieces), np.full(lengths[-1], pad_id, np.int32)]
        ),
        position_ids=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        loss_mask=np.concatenate(
            [*(piece.loss_mask for piece in pieces), np.zeros(lengths[-1], np.bool_)]
        ),
        used=used,
    )
