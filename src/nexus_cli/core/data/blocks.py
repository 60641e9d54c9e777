"""Packed sequences in memory or mapped from a cache, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nexus_cli.core.data.batch import Batch

# Shape letters in this file: N blocks of a set, S tokens a block, B blocks of a batch.


@dataclass(frozen=True)
class PackedBlocks:
    """Sequences of one length, each packed from documents of one source; sources in order.

    Attributes:
        input_ids_NS: int32; padding is the tokenizer's pad token.
        position_ids_NS: int32, restarts at 0 with every document and with the padding.
        loss_mask_NS: bool; True where the token at this position is a target.
        source_N: int16 index of the source, ascending.
        num_sources: how many sources the mixture has.
    """

    input_ids_NS: NDArray[np.int32]
    position_ids_NS: NDArray[np.int32]
    loss_mask_NS: NDArray[np.bool_]
    source_N: NDArray[np.int16]
    num_sources: int

    def __len__(self) -> int:
        return len(self.source_N)

    @property
    def seq_len(self) -> int:
        """Tokens a block."""
        return int(self.input_ids_NS.shape[1])

    @property
    def blocks_per_source(self) -> list[int]:
        """How many blocks each source has; they lie one source after the other."""
        counts = np.bincount(np.asarray(self.source_N), minlength=self.num_sources)
        return [int(count) for count in counts]


def collate(blocks: PackedBlocks, index_B: NDArray[np.int64]) -> Batch:
    """Make one batch of the blocks ``index_B``, in that order."""
    index_B = np.asarray(index_B, dtype=np.int64)
    return Batch(
        input_ids_BS=torch.from_numpy(blocks.input_ids_NS[index_B].astype(np.int64)),
        position_ids_BS=torch.from_numpy(blocks.position_ids_NS[index_B].astype(np.int64)),
        loss_mask_BS=torch.from_numpy(np.array(blocks.loss_mask_NS[index_B])),
        source_B=torch.from_numpy(blocks.source_N[index_B].astype(np.int64)),
        index_B=torch.from_numpy(index_B.copy()),
    )


def batches(blocks: PackedBlocks, index_N: NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
    """Yield batches of ``batch_size`` blocks in the order of ``index_N``; the last may be short."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    for start in range(0, len(index_N), batch_size):
        yield collate(blocks, index_N[start : start + batch_size])
