"""Sequences and what a teacher says of them, as arrays."""

# ruff: noqa: N802 - a property that gives an array is named like one

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: B rows (sequences), S positions, K kept entries, T temperatures of
# the tail, D sampled tail tokens, L layers, A experts a token and layer.
# M held positions, those whose next token is a target, row after row.


@dataclass(frozen=True)
class Kept:
    """The teacher's distribution of the next token at the held positions.

    Attributes:
        ids_MK: int32 token ids, likeliest first; 0 where not used.
        logprobs_MK: float32 log-probabilities at T = 1 over the whole vocabulary; ``-inf`` where
            not used. Used entries come first.
        tails_MT: float32 ``log sum p^(1/T)`` over all tokens that are not kept, at the
            temperatures 1, 2 and 4; the first is the log of the tail's mass. ``-inf`` if there is
            no such token.
        nll_M: float32 negative log-probability of the next token.
        tail_samples_MD: int32 ids drawn from the tail, with replacement, or ``None``; -1 where
            there is no tail.
        experts_MLA: uint8 experts that every layer chose for the token here, ascending, or
            ``None``.
    """

    ids_MK: NDArray[np.int32]
    logprobs_MK: NDArray[np.float32]
    tails_MT: NDArray[np.float32]
    nll_M: NDArray[np.float32]
    tail_samples_MD: NDArray[np.int32] | None = None
    experts_MLA: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.nll_M)

    @property
    def nbytes(self) -> int:
        """In memory."""
        return _bytes_of(self)


@dataclass(frozen=True)
class StoreRows:
    """Sequences, and what the teacher says of them; position t predicts token t + 1.

    Attributes:
        input_ids_BS: int32.
        position_ids_BS: int32, 0 at every document start.
        loss_mask_BS: bool; True where the token at this position is a target.
        source_B: int16 index of the data source.
        kept: of the held positions.
    """

    input_ids_BS: NDArray[np.int32]
    position_ids_BS: NDArray[np.int32]
    loss_mask_BS: NDArray[np.bool_]
    source_B: NDArray[np.int16]
    kept: Kept

    def __len__(self) -> int:
        return len(self.source_B)

    @property
    def nbytes(self) -> int:
        """In memory."""
        return _bytes_of(self)

    @cached_property
    def held_BS(self) -> NDArray[np.bool_]:
        """True where the next token is a target, so that a distribution is held."""
        return held_positions(self.loss_mask_BS)

    @cached_property
    def splits(self) -> NDArray[np.int64]:
        """Row b's held positions are ``[splits[b], splits[b + 1])`` of all of them."""
        return np.concatenate([[0], np.cumsum(self.held_BS.sum(1))])


def _bytes_of(arrays: Kept | StoreRows) -> int:
    """Of all arrays that there are."""
    parts = (getattr(arrays, field.name) for field in fields(arrays))
    return sum(part.nbytes for part in parts if part is not None)


def held_positions(loss_mask_BS: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True where the next token is a target."""
    held_BS = np.zeros_like(loss_mask_BS)
    held_BS[:, :-1] = loss_mask_BS[:, 1:]
    return held_BS
