"""Adds raw router logits to running sums, on the device that computed them.

The logits are the router's own, before top-k: what a library records under the name "router
logits" has been post-softmax scores in some versions, and a module hook sees nothing under fused
kernels. Probabilities and top-k sets are therefore computed here, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_cli.core.router.batching import to_device
from nexus_cli.core.router.moments import Reservoir, RouterMoments, TokenSums

# Shape letters in this file: L layers, E experts, N tokens, K experts a token, R kept tokens,
# T rows of a forward pass, padding included.

GROUP_NUMBERS = 2**24  # float64 numbers of each temporary array: 128 MiB
GROUP_NUMBERS_CPU = 2**17  # they stay in the cache
WAITING_BYTES = 2**28  # of sampled tokens on the device, before they are fetched


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

    def add(self, layers: slice, logits_LNE: Tensor, top_k: int) -> Tensor:
        """Add the tokens of some layers; the caller counts them once for all layers.

        Counts are sums over a mask: no atomics, and nothing that waits for the device.

        Returns:
            The probabilities ``[L, N, E]``, float64.
        """
        top_LNK, expert_LNK = logits_LNE.topk(top_k, dim=-1)  # sorted: column 0 is the top 1
        place_LNE = torch.zeros_like(logits_LNE, dtype=torch.uint8)
        place_LNE.scatter_(-1, expert_LNK, 1).scatter_(-1, expert_LNK[..., :1], 2)
        self.topk_LE[layers] += (place_LNE > 0).sum(1)
        self.top1_LE[layers] += (place_LNE > 1).sum(1)
        weight_LNK = top_LNK.double().softmax(-1)
        weight_LNE = torch.zeros_like(logits_LNE, dtype=torch.float64)
        self.weight_LE[layers] += weight_LNE.scatter_(-1, expert_LNK, weight_LNK).sum(1)
        probability_LNE = logits_LNE.double().softmax(-1)
        self.probability_LE[layers] += probability_LNE.sum(1)
        self.outer_LEE[layers].baddbmm_(probability_LNE.transpose(1, 2), probability_LNE)
        return probability_LNE


class MomentAccumulator:
    """Running :class:`RouterMoments` on one device.

    Adding does not wait for the device: sums and sampled tokens stay there, and are fetched by
    :meth:`moments`, or when many tokens were sampled.
    """

    def __init__(self, start: RouterMoments, device: torch.device) -> None:
        """Continue from ``start``; pass ``RouterMoments.zeros(...)`` to begin."""
        self._top_k = start.top_k
        self._shape = start.num_layers, start.num_experts
        self._body = _DeviceSums.of(start.body, device)
        self._first = _DeviceSums.of(start.first, device)
        self._samples = _Samples(start.reservoir)

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
        entering = self._samples.admits(keys_N)
        entering_R = to_device(torch.from_numpy(entering), body_N.device)
        samples = []
        for layers in _groups(len(router_logits), router_logits[0]):
            logits_LTE = torch.stack(list(router_logits[layers]))
            body_LNE = logits_LTE.index_select(1, body_N)
            probability_LNE = self._body.add(layers, body_LNE, self._top_k)
            self._first.add(layers, logits_LTE.index_select(1, first_N), self._top_k)
            if len(entering):
                samples.append(probability_LNE.index_select(1, entering_R).half())
        self._body.tokens += len(body_N)
        self._first.tokens += len(first_N)
        if len(entering):
            self._samples.add(keys_N[entering], torch.cat(samples))

    def moments(self) -> RouterMoments:
        """What was counted so far, on the host; the accumulator can go on.

        Raises:
            ValueError: if a router produced NaN or infinite logits.
        """
        found = RouterMoments(
            top_k=self._top_k,
            body=self._body.on_host(),
            first=self._first.on_host(),
            reservoir=self._samples.fetch(),
        )
        for sums in (found.body, found.first):
            bad = ~np.isfinite(sums.probability_LE).all(axis=1)
            if bad.any():
                raise ValueError(f"the router of layer {int(bad.argmax())} produced NaN")
        return found


class _Samples:
    """A reservoir whose newest tokens are still on the device; their keys are known at once."""

    def __init__(self, start: Reservoir) -> None:
        self._fetched = start
        self._keys = _keys_alone(start.capacity, start.keys_R)  # the new ones included
        self._new: list[tuple[NDArray[np.uint64], Tensor]] = []
        self._bytes = 0

    def admits(self, keys_N: NDArray[np.uint64]) -> NDArray[np.intp]:
        return self._keys.admits(keys_N)

    def add(self, keys_R: NDArray[np.uint64], probability_LRE: Tensor) -> None:
        self._keys = self._keys + _keys_alone(self._keys.capacity, keys_R)
        self._new.append((keys_R, probability_LRE))
        self._bytes += probability_LRE.nbytes
        if self._bytes > WAITING_BYTES:
            self.fetch()

    def fetch(self) -> Reservoir:
        """All of it on the host; of the new tokens, those that have not been pushed out."""
        if self._new:
            keys_R = np.concatenate([keys for keys, _ in self._new])
            stays = np.flatnonzero(np.isin(keys_R, self._keys.keys_R))
            stays = stays[np.argsort(keys_R[stays], kind="stable")]
            probability_LRE = torch.cat([values for _, values in self._new], dim=1)
            chosen_R = torch.from_numpy(stays).to(probability_LRE.device)
            chosen_RLE = probability_LRE.index_select(1, chosen_R).transpose(0, 1).contiguous()
            new = Reservoir(self._fetched.capacity, keys_R[stays], chosen_RLE.cpu().numpy())
            self._fetched = self._fetched + new
            self._new, self._bytes = [], 0
        return self._fetched


def _keys_alone(capacity: int, keys_R: NDArray[np.uint64]) -> Reservoir:
    return Reservoir(capacity, keys_R, np.empty((len(keys_R), 0, 0), np.float16))


def _groups(num_layers: int, logits_TE: Tensor) -> Iterator[slice]:
    """Layers that are worked on together: few launches on a GPU, little memory anywhere."""
    numbers = GROUP_NUMBERS if logits_TE.is_cuda else GROUP_NUMBERS_CPU
    size = max(1, numbers // max(1, logits_TE.numel()))
    for start in range(0, num_layers, size):
        yield slice(start, min(start + size, num_layers))
