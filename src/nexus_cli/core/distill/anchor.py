"""SFA: pull the trained weights back towards an anchor every few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AnchorKind = Literal["start", "previous"]


@dataclass(frozen=True)
class AnchorMove:
    """Size of one merge.

    Attributes:
        l2: Euclidean norm of the change over all weights together.
        max: largest change of a single weight.
    """

    l2: float
    max: float


class Anchor:
    """Sequential fine-tuning with averaging: ``theta <- (1 - beta) theta + beta theta_anchor``.

    Soup to go, arXiv 2501.05559. The anchor is the model at the start (the paper's form, which
    bounds how far the weights can drift), or the result of the previous merge (which only slows
    them down). Works on the fp32 master weights: in bf16 a small pull rounds away. Optimizer
    state is left alone. Every rank holds equal masters, so every rank merges by itself.
    """

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        *,
        beta: float,
        every: int,
        kind: AnchorKind = "start",
        device: torch.device | str | None = None,
        read: Callable[[Tensor], Tensor] = Tensor.detach,
        write: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    ) -> None:
        """Remember ``masters`` as they are now.

        Args:
            masters: trained tensors by name, before the first step.
            beta: weight of the anchor, in (0, 1].
            every: optimizer steps between merges.
            kind: ``start`` or ``previous``.
            device: where to keep the anchor; ``None`` for beside the masters. It takes as much
                memory as they do in fp32.
            read: gives a master's exact fp32 value; by default it is that itself.
            write: gives it another one. Both are for an optimizer that keeps masters in parts.
        """
        if not 0 < beta <= 1:
            raise ValueError(f"beta must lie in (0, 1], not {beta}")
        if every < 1:
            raise ValueError(f"merges must be at least one step apart, not {every}")
        self.beta = beta
        self.every = every
        self.kind = kind
        self._read, self._write = read, write
        self._anchors = {
            name: read(tensor).detach().to(device=device, copy=True)
            for name, tensor in masters.items()
        }

    def due(self, done_steps: int) -> bool:
        """Whether to merge now that ``done_steps`` optimizer steps are done."""
        return done_steps > 0 and done_steps % self.every == 0

    @torch.no_grad()
    def merge(self, masters: Mapping[str, Tensor]) -> AnchorMove:
        """Pull ``masters`` towards the anchor in place.

        Raises:
            ValueError: if the names are not the ones that the anchor was made of.
        """
        self._require_names(masters)
        square, largest = 0.0, 0.0
        for name, master in masters.items():
            before = self._read(master)
            merged = before.lerp(self._anchors[name].to(before.device, before.dtype), self.beta)
            change = (merged - before).flatten()
            self._write(master, merged)
            if change.numel():
                square += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
                largest = max(largest, float(change.abs().max()))
            if self.kind == "previous":
                self._anchors[name].copy_(merged)
        return AnchorMove(math.sqrt(square), largest)

    def state_dict(self) -> dict[str, Tensor]:
        """The anchor's tensors by name, to be saved with a checkpoint."""
        return dict(self._anchors)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the anchor from a checkpoint.

        Raises:
            ValueError: if names or shapes differ from the present ones.
        """
        self._require_names(state)
        for name, tensor in state.items():
            if tensor.shape != self._anchors[name].shape:
                raise ValueError(
                    f"the anchor of {name} has shape {tuple(tensor.shape)}, "
                    f"not {tuple(self._anchors[name].shape)}"
                )
            self._anchors[name].copy_(tensor)

    def _require_names(self, tensors: Mapping[str, Tensor]) -> None:
        if differing := sorted(self._anchors.keys() ^ tensors.keys()):
            raise ValueError(f"the anchor was made of other tensors: {', '.join(differing[:5])}")
