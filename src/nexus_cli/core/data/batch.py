"""A batch of packed sequences, as every stage that runs a model takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Shape letters in this file: B sequences, S tokens a sequence.


@dataclass(frozen=True)
class Batch:
    """Packed sequences, on the CPU until moved.

    The labels of hidden state ``t`` are ``input_ids_BS[:, t + 1]``, counted where
    ``loss_mask_BS[:, t + 1]``.

    Attributes:
        input_ids_BS: int64 token ids.
        position_ids_BS: int64, 0 at every document start.
        loss_mask_BS: bool; True where the token at this position is a target. The first token
            of a document never is, nor is padding.
        source_B: int64 index of the data source; a sequence never mixes sources.
        index_B: int64 index of the sequence in its set.
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    loss_mask_BS: Tensor
    source_B: Tensor
    index_B: Tensor

    def __len__(self) -> int:
        return self.input_ids_BS.shape[0]

    @property
    def num_targets(self) -> int:
        """How many tokens of the batch are counted in a loss."""
        return int(self.loss_mask_BS[:, 1:].sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; asynchronous from pinned memory."""
        return Batch(
            *(
                tensor.to(device, non_blocking=True)
                for tensor in (
                    self.input_ids_BS,
                    self.position_ids_BS,
                    self.loss_mask_BS,
                    self.source_B,
                    self.index_B,
                )
            )
        )
