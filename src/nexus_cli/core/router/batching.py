"""Sequences of different lengths to padded batches whose real tokens are known by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_cli.core.router.moments import token_keys

# Shape letters in this file: B sequences of a batch, S padded length, N real tokens but the first
# of each sequence.

PAD_MULTIPLE = 32  # few different shapes, so that nothing is compiled or tuned again and again


@dataclass(frozen=True)
class TokenBatch:
    """One forward pass.

    Attributes:
        input_ids_BS: int64, padded on the right.
        position_ids_BS: int64, from 0 in every row.
        body_N: places of the real tokens but the first ones in the flattened batch, int64.
        first_B: places of the first tokens, int64.
        keys_N: reservoir keys of ``body_N``, uint64, on the host.
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    body_N: Tensor
    first_B: Tensor
    keys_N: NDArray[np.uint64]

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on ``device``, without waiting for it; the keys stay on the host."""
        return TokenBatch(
            to_device(self.input_ids_BS, device),
            to_device(self.position_ids_BS, device),
            to_device(self.body_N, device),
            to_device(self.first_B, device),
            self.keys_N,
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host; to a GPU in the order of its queue, which is not waited for."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[tuple[int, ...]]:
    """Group sequences of like length: the longest first, so that memory is asked for at once.

    All batches but the last have about as many tokens, padding included, so that short sequences
    keep a device as busy as long ones, in the same memory.

    Args:
        lengths: tokens of each sequence.
        batch_size: sequences of the first batch; of shorter ones more go into a batch.

    Returns:
        Indices of each batch's sequences; every sequence is in exactly one batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[tuple[int, ...]] = []
    start = 0
    while start < len(order):
        tokens = batch_size * padded_length(lengths[order[0]])
        size = max(1, tokens // padded_length(lengths[order[start]]))
        batches.append(tuple(order[start : start + size]))
        start += size
    return batches


def padded_length(length: int) -> int:
    """What a sequence takes in a batch whose longest it is."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def make_batch(
    sequences: Sequence[NDArray[np.int32]], numbers: Sequence[int], *, pad_id: int, seed: int
) -> TokenBatch:
    """Pad sequences to one batch.

    Args:
        sequences: token ids, none empty.
        numbers: of each sequence in the whole run; with the position it names a token, so that
            its reservoir key does not depend on the batch that it is in.
        pad_id: any token id; pads follow the text, so no real token sees them.
        seed: of the reservoir.
    """
    padded = padded_length(max(len(ids) for ids in sequences))
    ids_BS = np.full((len(sequences), padded), pad_id, dtype=np.int64)
    for row, ids in enumerate(sequences):
        ids_BS[row, : len(ids)] = ids
    lengths_B = np.array([len(ids) for ids in sequences])
    position_S = np.arange(padded)
    row_N, position_N = np.nonzero(
        (position_S[None, :] < lengths_B[:, None]) & (position_S[None, :] > 0)
    )
    number_N = np.asarray(numbers, dtype=np.int64)[row_N]
    return TokenBatch(
        input_ids_BS=torch.from_numpy(ids_BS),
        position_ids_BS=torch.from_numpy(position_S).expand(len(sequences), -1).contiguous(),
        body_N=torch.from_numpy(row_N * padded + position_N),
        first_B=torch.arange(len(sequences)) * padded,
        keys_N=token_keys(number_N, position_N.astype(np.int64), seed),
    )
