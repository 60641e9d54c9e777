"""Rows of one length from documents of many, with attention that stops at document ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from encode import Documents
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Packed rows.

    Attributes:
        inputs: int64 ``[rows, length]``.
        labels: int64, the token that follows each input, -100 where nothing is learnt.
        positions: int64, counted from the start of the document or the row.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor


def packed_epoch(
    documents: Documents, length: int, num_rows: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Batches over all documents in a new order, end to end; the last part-batch is dropped.

    A text document loses its start token half of the time, so that the model reads both.
    """
    order = rng.permutation(len(documents))
    lengths, starts = documents.lengths(), documents.ends - documents.lengths()
    skipped = (documents.is_text & (rng.random(len(documents)) < 0.5)).astype(np.int64)
    kept, firsts = (lengths - skipped)[order], (starts + skipped)[order]
    begins = np.cumsum(kept) - kept
    total = int(kept.sum())
    within = np.arange(total) - np.repeat(begins, kept)
    stream = documents.tokens[np.repeat(firsts, kept) + within].astype(np.int64)
    size = length * num_rows
    for start in range(0, total - size, size):
        end = start + size
        labels = np.where(within[start + 1 : end + 1] == 0, IGNORED, stream[start + 1 : end + 1])
        yield _batch(stream[start:end], labels, within[start:end], length)


def _batch(
    inputs: NDArray[np.int64], labels: NDArray[np.int64], within: NDArray[np.int64], length: int
) -> Batch:
    positions = np.minimum(within.reshape(-1, length), np.arange(length))
    tensors = [torch.from_numpy(part.reshape(-1, length)) for part in (inputs, labels, positions)]
    return Batch(*tensors)


def attention_masks(positions: Tensor, window: int) -> dict[str, Tensor]:
    """Additive bf16 masks ``[rows, 1, length, length]`` for both kinds of layer."""
    length = positions.shape[1]
    place = torch.arange(length, device=positions.device)
    first = (place - positions)[:, None, :, None]  # where each query's document begins in its row
    key, query = place[None, None, None, :], place[None, None, :, None]
    full = (key <= query) & (key >= first)
    near = full & (key > query - window)
    return {"full_attention": _additive(full), "sliding_attention": _additive(near)}


def _additive(allowed: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.bfloat16, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(torch.bfloat16).min)
