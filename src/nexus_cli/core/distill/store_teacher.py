"""The teacher that speaks from a store, and the text that it was asked about."""

# ruff: noqa: N802, D102 - a read-only attribute of a protocol is spelled as a property

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.teacher import TopKSignal

# Shape letters in this file: B sequences, S positions, K kept entries, N = B * S,
# T temperatures of the tail, M held positions: those whose next token is a target.


class StoredKept(Protocol):
    """What is kept at the held positions; ``nexus_cli.io.teacher_store.rows.Kept`` is one."""

    @property
    def ids_MK(self) -> NDArray[np.int32]: ...
    @property
    def logprobs_MK(self) -> NDArray[np.float32]: ...
    @property
    def tails_MT(self) -> NDArray[np.float32]: ...
    @property
    def tail_samples_MD(self) -> NDArray[np.int32] | None: ...


class StoredRows(Protocol):
    """Rows of a store; ``nexus_cli.io.teacher_store.rows.StoreRows`` is one."""

    @property
    def input_ids_BS(self) -> NDArray[np.int32]: ...
    @property
    def position_ids_BS(self) -> NDArray[np.int32]: ...
    @property
    def loss_mask_BS(self) -> NDArray[np.bool_]: ...
    @property
    def source_B(self) -> NDArray[np.int16]: ...
    @property
    def held_BS(self) -> NDArray[np.bool_]: ...
    @property
    def kept(self) -> StoredKept: ...


class Store(Protocol):
    """Anything that gives rows by their index."""

    def rows(self, index_B: Sequence[int] | NDArray[np.int64]) -> StoredRows:
        """The rows ``index_B``, in that order."""
        ...


class StoreTeacher:
    """A :class:`~nexus_cli.core.distill.teacher.Teacher` that looks batches up in a store."""

    def __init__(self, store: Store, *, dense: bool = False, samples: bool = False) -> None:
        """Speak from ``store``.

        Args:
            store: where the answers are.
            dense: it keeps the whole vocabulary.
            samples: say of the tail what was drawn from it, not its mass alone; at T = 1 only.
        """
        self._store = store
        self._dense = dense
        self._samples = samples

    def signal(self, batch: Batch) -> TopKSignal:
        """The stored view of every position, found by ``batch.index_B``.

        Positions whose next token is no target are not stored: their entries are unused, and
        their tail is NaN, so that a loss that counts them by mistake is not a number.

        Raises:
            ValueError: the batch's tokens are not the ones stored under its indices.
        """
        device = batch.input_ids_BS.device
        rows = self._store.rows(batch.index_B.cpu().numpy())
        if not np.array_equal(rows.input_ids_BS, batch.input_ids_BS.cpu().numpy()):
            raise ValueError("the batch holds other tokens than the teacher store at its indices")
        held_N, kept = rows.held_BS.reshape(-1), rows.kept
        ids_MK, logprobs_MK, tails_MT = kept.ids_MK, kept.logprobs_MK, kept.tails_MT
        if self._samples:
            ids_MK, logprobs_MK = with_samples(kept)
            tails_MT = np.full_like(tails_MT, -np.inf)
        return TopKSignal(
            ids_NK=_spread(ids_MK, held_N, np.int64, 0).to(device),
            logprobs_NK=_spread(logprobs_MK, held_N, np.float32, -np.inf).to(device),
            tails_NT=_spread(tails_MT, held_N, np.float32, np.nan).to(device),
            dense=self._dense,
        )


def with_samples(kept: StoredKept) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Entries with the samples of the tail beside them, each with its share of the tail's mass.

    The gradient of the KL against these is right on average (random sampling of the teacher,
    ACL 2025), where one bucket says nothing of how the tail is spread; but it is noisy.

    Returns:
        Ids ``[M, K + D]`` and log-probabilities, ``-inf`` where not used: a token that was drawn
        more than once is one entry.

    Raises:
        ValueError: there are no samples.
    """
    if kept.tail_samples_MD is None:
        raise ValueError("the store holds no samples of the tail")
    drawn_MD = np.sort(kept.tail_samples_MD, axis=1)
    num_held, draws = drawn_MD.shape
    first_MD = np.ones((num_held, draws), np.bool_)
    first_MD[:, 1:] = drawn_MD[:, 1:] != drawn_MD[:, :-1]
    starts = np.flatnonzero(first_MD)
    counts_MD = np.zeros((num_held, draws), np.float32)
    counts_MD[first_MD] = np.diff(np.append(starts, num_held * draws))
    counts_MD[drawn_MD < 0] = 0
    with np.errstate(divide="ignore"):
        shares_MD = kept.tails_MT[:, :1] + np.log(counts_MD / np.float32(draws))
    ids_MX = np.concatenate([kept.ids_MK, np.maximum(drawn_MD, 0)], axis=1)
    return ids_MX, np.concatenate([kept.logprobs_MK, shares_MD], axis=1)


def stored_batch(store: Store, index_B: Sequence[int] | NDArray[np.int64]) -> Batch:
    """The sequences ``index_B`` of a store, so that offline training needs no text."""
    rows = store.rows(index_B)
    return Batch(
        input_ids_BS=torch.from_numpy(rows.input_ids_BS.astype(np.int64)),
        position_ids_BS=torch.from_numpy(rows.position_ids_BS.astype(np.int64)),
        loss_mask_BS=torch.from_numpy(rows.loss_mask_BS.copy()),
        source_B=torch.from_numpy(rows.source_B.astype(np.int64)),
        index_B=torch.tensor(np.asarray(index_B, dtype=np.int64)),
    )


def _spread(
    values_MX: NDArray[Any], held_N: NDArray[np.bool_], dtype: type[np.generic], filler: float
) -> Tensor:
    """Values at the held positions, ``filler`` elsewhere ``[N, X]``.

    Done by numpy: torch would start threads of its own for the thread that reads ahead, and
    those take the CPU from the student. A step with them took twice as long.
    """
    spread_NX = np.full((len(held_N), values_MX.shape[1]), filler, dtype)
    spread_NX[held_N] = values_MX
    return torch.from_numpy(spread_NX)
