"""What every layer must know of the positions of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexus_cli.core.kernels.attention import attention_starts, last_query

# Shape letters in this file: B sequences, S positions, T = B * S, C half of a head's width.

SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Positions:
    """Rotary angles and who sees whom, the same for all layers of a kind.

    Attributes:
        batch: B.
        length: S.
        cos_TC: cosines of the rotary angles, float32 ``[T, C]``.
        sin_TC: sines.
        starts: first key that each query sees, int32 ``[B, S]``, by kind of layer.
        lasts: last query that sees each key, int32 ``[B, S]``, by kind; for the backward pass.
    """

    batch: int
    length: int
    cos_TC: Tensor
    sin_TC: Tensor
    starts: dict[str, Tensor]
    lasts: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order of their own."""
        return [self.cos_TC, self.sin_TC, *self.starts.values(), *self.lasts.values()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Positions:
        """The same positions over other memory, in the order of :attr:`tensors`."""
        cos_TC, sin_TC, *rest = tensors
        kinds = list(self.starts)
        starts = dict(zip(kinds, rest, strict=False))
        lasts = dict(zip(self.lasts, rest[len(kinds) :], strict=True))
        return Positions(self.batch, self.length, cos_TC, sin_TC, starts, lasts)


def make_positions(
    rotary: Any,
    position_ids_BS: Tensor,
    kinds: Iterable[str],
    window: int,
    *,
    dtype: torch.dtype,
    needs_backward: bool,
) -> Positions:
    """Positions that restart at 0 part the documents of a packed sequence.

    Args:
        rotary: the model's rotary embedding; called for angles in float32, whatever the model's
            dtype: bf16 angles cost half of bf16's precision in every product of a query and a key.
        position_ids_BS: int64; one row for all sequences will do.
        kinds: of attention layers in the model.
        window: positions that a sliding layer sees, itself included.
        dtype: of the activations; float64 for tests, else the angles are float32.
        needs_backward: also work out ``lasts``.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = rotary(torch.empty(0, dtype=wide, device=position_ids_BS.device), position_ids_BS)
    starts = {
        kind: attention_starts(position_ids_BS, window if kind == SLIDING else None)
        for kind in set(kinds)
    }
    batch, length = position_ids_BS.shape
    return Positions(
        batch=batch,
        length=length,
        cos_TC=cos.reshape(batch * length, -1).contiguous(),
        sin_TC=sin.reshape(batch * length, -1).contiguous(),
        starts=starts,
        lasts={k: last_query(start) for k, start in starts.items()} if needs_backward else {},
    )
