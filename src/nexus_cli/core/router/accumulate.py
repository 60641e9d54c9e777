"""Adds raw router logits to running sums, on the device that computed them.

The logits are the router's own, before top-k: what a library records under the name "router
logits" has been post-softmax scores in some versions, and a module hook sees nothing under fused
kernels. Probabilities and top-k sets are therefore computed here, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_cli.core.router.moments import Reservoir, RouterMoments, TokenSums

# Shape letters in this file: L layers, E experts, N tokens, K experts a token, R kept tokens.


@dataclass
class _DeviceSums:
    """:class:`TokenSums` as tensors, changed in place."""

    tokens: int
    probability_LE: Tensor
    outer_LEE: Tensor
    top1_LE: Tensor
    topk_LE: Tensor
    weight_LE: Tensor

    @classmethod
    def of(cls, sums: TokenSums, device: torch.device) -> _DeviceSums:
        names = ("probability_LE", "outer_LEE", "top1_LE", "topk_LE", "weight_LE")
        # copies: the caller's arrays must not change with ours
        tensors = {n: torch.tensor(getattr(sums, n), device=device) for n in names}
        return cls(tokens=sums.tokens, **tensors)

    def on_host(self) -> TokenSums:
        return TokenSums(
            tokens=self.tokens,
            probability_LE=self.probability_LE.cpu().numpy().copy(),
            outer_LEE=self.outer_LEE.cpu().numpy().copy(),
            top1_LE=self.top1_LE.cpu().numpy().copy(),
            topk_LE=self.topk_LE.cpu().numpy().copy(),
            weight_LE=self.weight_LE.cpu().numpy().copy(),
        )

    def add(self, layer: int, logits_NE: Tensor, probability_NE: Tensor, top_k: int) -> None:
        """Add one layer's tokens; the caller counts them once for all layers."""
        num_experts = logits_NE.shape[-1]
        top_NK, expert_NK = logits_NE.topk(top_k, dim=-1)  # sorted: column 0 is the top 1
        self.probability_LE[layer] += probability_NE.sum(0)
        self.outer_LEE[layer].addmm_(probability_NE.T, probability_NE)
        self.top1_LE[layer] += torch.bincount(expert_NK[:, 0], minlength=num_experts)
        self.topk_LE[layer] += torch.bincount(expert_NK.flatten(), minlength=num_experts)
        weight_NE = torch.zeros_like(probability_NE).scatter_(-1, expert_NK, top_NK.softmax(-1))
        self.weight_LE[layer] += weight_NE.sum(0)


class MomentAccumulator:
    """Running :class:`RouterMoments` on one device."""

    def __init__(self, start: RouterMoments, device: torch.device) -> None:
        """Continue from ``start``; pass ``RouterMoments.zeros(...)`` to begin."""
        self._top_k = start.top_k
        self._shape = start.num_layers, start.num_experts
        self._body = _DeviceSums.of(start.body, device)
        self._first = _DeviceSums.of(start.first, device)
        self._reservoir = start.reservoir

    def add(
        self,
        router_logits: Sequence[Tensor],
        body_N: Tensor,
        first_N: Tensor,
        keys_N: NDArray[np.uint64],
    ) -> None:
        """Add the tokens of one forward pass.

        Args:
            router_logits: raw logits of each layer ``[B * S, E]``, any float dtype.
            body_N: rows to count as ordinary tokens, int64, on the device; padding is simply
                not listed.
            first_N: rows that are the first of their sequence, int64.
            keys_N: reservoir keys of ``body_N``, uint64, on the host.

        Raises:
            ValueError: if the logits are not of ``start``'s shape, or a key is missing.
        """
        if len(keys_N) != len(body_N):
            raise ValueError(f"{len(body_N)} tokens, but {len(keys_N)} keys")
        shape = len(router_logits), *{logits.shape[-1] for logits in router_logits}
        if shape != self._shape:
            raise ValueError(f"router logits of (layers, experts) {shape}, not {self._shape}")
        entering = self._reservoir.admits(keys_N)
        entering_R = torch.from_numpy(entering).to(body_N.device)
        samples = []
        for layer, logits_NE in enumerate(router_logits):
            body_NE = logits_NE.index_select(0, body_N).double()
            probability_NE = body_NE.softmax(-1)
            self._body.add(layer, body_NE, probability_NE, self._top_k)
            first_NE = logits_NE.index_select(0, first_N).double()
            self._first.add(layer, first_NE, first_NE.softmax(-1), self._top_k)
            samples.append(probability_NE.index_select(0, entering_R).half())
        self._body.tokens += len(body_N)
        self._first.tokens += len(first_N)
        if len(entering):
            kept = torch.stack(samples, dim=1).cpu().numpy()
            order = np.argsort(keys_N[entering], kind="stable")
            new = Reservoir(self._reservoir.capacity, keys_N[entering][order], kept[order])
            self._reservoir = self._reservoir + new

    def moments(self) -> RouterMoments:
        """What was counted so far, on the host; the accumulator can go on.

        Raises:
            ValueError: if a router produced NaN or infinite logits.
        """
        found = RouterMoments(
            top_k=self._top_k,
            body=self._body.on_host(),
            first=self._first.on_host(),
            reservoir=self._reservoir,
        )
        for sums in (found.body, found.first):
            bad = ~np.isfinite(sums.probability_LE).all(axis=1)
            if bad.any():
                raise ValueError(f"the router of layer {int(bad.argmax())} produced NaN")
        return found
