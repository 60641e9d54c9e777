"""From each token's experts to rows sorted by expert, and back, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Shape letters in this file: T tokens, K experts a token, R = T * K routed rows, E experts.


@dataclass(frozen=True)
class Routing:
    """Which token every routed row belongs to, rows being sorted by expert.

    Attributes:
        slot_R: ``t * K + k`` of every sorted row, int32.
        row_TK: the sorted row that holds token ``t``'s ``k``-th expert, int32: the inverse.
        expert_R: expert of every sorted row, int32, ascending.
        offsets_E: the row after each expert's last, int32; the last is R.
        token_R: token of every sorted row, int32.
        top_k: K.
    """

    slot_R: Tensor
    row_TK: Tensor
    expert_R: Tensor
    offsets_E: Tensor
    token_R: Tensor
    top_k: int

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.offsets_E)

    @property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All five tensors, in the order of the fields."""
        return self.slot_R, self.row_TK, self.expert_R, self.offsets_E, self.token_R

    @classmethod
    def of(cls, vectors: Sequence[Tensor], top_k: int) -> Routing:
        """From :attr:`vectors`."""
        slot_R, row_TK, expert_R, offsets_E, token_R = vectors
        return cls(slot_R, row_TK, expert_R, offsets_E, token_R, top_k)


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> Routing:
    """Sort the routed rows by expert; rows of one expert stay in the order of the tokens.

    Args:
        experts_TK: indices of each token's experts, any integer type.
        num_experts: E.
    """
    if experts_TK.is_cuda:
        from nexus_cli.core.kernels.triton.routing import counting_sort

        contiguous = experts_TK.int().contiguous()
        return Routing.of(counting_sort(contiguous, num_experts), experts_TK.shape[1])
    return sort_by_expert_torch(experts_TK, num_experts)


def sort_by_expert_torch(experts_TK: Tensor, num_experts: int) -> Routing:
    """:func:`sort_by_expert` in PyTorch, on any device."""
    tokens, top_k = experts_TK.shape
    expert_R, slot_R = torch.sort(experts_TK.reshape(-1).int(), stable=True)
    slot_R = slot_R.int()
    places_E = torch.arange(num_experts, dtype=torch.int32, device=expert_R.device)
    rows_R = torch.arange(tokens * top_k, dtype=torch.int32, device=expert_R.device)
    row_R = torch.empty_like(slot_R).scatter_(0, slot_R.long(), rows_R)
    return Routing(
        slot_R=slot_R,
        row_TK=row_R.view(tokens, top_k),
        expert_R=expert_R,
        offsets_E=torch.searchsorted(expert_R, places_E, right=True, out_int32=True),
        token_R=slot_R // top_k,
        top_k=top_k,
    )
