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

# Shape letters in this file: B sequences, S positions, K kept entries, N = B * S.


class StoredRows(Protocol):
    """Rows of a store as arrays; ``nexus_cli.io.teacher_shards.StoreRows`` is one."""

    @property
    def input_ids_BS(self) -> NDArray[np.int32]: ...
    @property
    def position_ids_BS(self) -> NDArray[np.int32]: ...
    @property
    def loss_mask_BS(self) -> NDArray[np.bool_]: ...
    @property
    def source_B(self) -> NDArray[np.int16]: ...
    @property
    def ids_BSK(self) -> NDArray[np.int32]: ...
    @property
    def logprobs_BSK(self) -> NDArray[np.float32]: ...
    @property
    def tail_BS(self) -> NDArray[np.float32]: ...


class Store(Protocol):
    """Anything that gives rows by their index."""

    def rows(self, index_B: Sequence[int] | NDArray[np.int64]) -> StoredRows:
        """The rows ``index_B``, in that order."""
        ...


class StoreTeacher:
    """A :class:`~nexus_cli.core.distill.teacher.Teacher` that looks batches up in a store."""

    def __init__(self, store: Store) -> None:
        """Speak from ``store``, whose distributions are at temperature 1."""
        self._store = store

    def signal(self, batch: Batch) -> TopKSignal:
        """The stored view of every position, found by ``batch.index_B``.

        Positions whose next token is no target are not stored: their entries are unused.

        Raises:
            ValueError: the batch's tokens are not the ones stored under its indices.
        """
        device = batch.input_ids_BS.device
        rows = self._store.rows(batch.index_B.cpu().numpy())
        if not np.array_equal(rows.input_ids_BS, batch.input_ids_BS.cpu().numpy()):
            raise ValueError("the batch holds other tokens than the teacher store at its indices")
        return TopKSignal(
            ids_NK=_tensor(rows.ids_BSK, torch.int64).flatten(0, 1).to(device),
            logprobs_NK=_tensor(rows.logprobs_BSK, torch.float32).flatten(0, 1).to(device),
            tail_logprob_N=_tensor(rows.tail_BS, torch.float32).flatten().to(device),
        )


def stored_batch(store: Store, index_B: Sequence[int] | NDArray[np.int64]) -> Batch:
    """The sequences ``index_B`` of a store, so that offline training needs no text."""
    rows = store.rows(index_B)
    return Batch(
        input_ids_BS=_tensor(rows.input_ids_BS, torch.int64),
        position_ids_BS=_tensor(rows.position_ids_BS, torch.int64),
        loss_mask_BS=_tensor(rows.loss_mask_BS, torch.bool),
        source_B=_tensor(rows.source_B, torch.int64),
        index_B=torch.tensor(np.asarray(index_B, dtype=np.int64)),
    )


def _tensor(values: NDArray[Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)
