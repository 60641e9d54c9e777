"""What every hidden unit of every expert contributes, summed while the model runs.

A unit is one row of gate and up with its column of down. Its contribution to the output of a token
is ``w |a| ||d||``: the router's applied weight, the activation's magnitude, the length of the down
column. Summed over tokens it says which units do the work, whole and without any correspondence
between the units of different experts (for single networks: Hu et al. 2016, Network Trimming; with
the outgoing weights' norm as in Sun et al. 2023, Wanda).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_cli.core.kernels.routing import Routing
from nexus_cli.core.kernels.unit_sums import add_expert_, add_unit_sums_

# Shape letters in this file: L layers, E experts, I expert width, T rows of a forward pass,
# padding included, K experts a token, R = T * K routed rows sorted by expert, N counted tokens.


class UnitAccumulator:
    """Running sums on one device; :meth:`layer` gives what observes each layer's experts."""

    def __init__(self, start_LEI: NDArray[np.float64], down_norm_LEI: Tensor) -> None:
        """Continue from what was counted before.

        Args:
            start_LEI: contributions; zeros to begin.
            down_norm_LEI: length of every unit's down column, float32, on the device that the
                experts run on.
        """
        self._down_norm_LEI = down_norm_LEI
        # a copy: the caller's array must not change with ours
        self._sum_LEI = torch.tensor(start_LEI, device=down_norm_LEI.device)
        self._counted_T = torch.empty(0)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self._sum_LEI)

    def count(self, tokens: int, body_N: Tensor) -> None:
        """Say which rows of the forward pass that follows are counted.

        Args:
            tokens: T.
            body_N: rows to count, int64, on the device.
        """
        counted_T = torch.zeros(tokens, device=self._sum_LEI.device)
        self._counted_T = counted_T.index_fill_(0, body_N, 1.0)

    def layer(self, index: int) -> LayerUnits:
        """The observer of a layer's experts."""
        return LayerUnits(self, index)

    def add_expert(
        self, layer: int, expert: int, hidden_NI: Tensor, slot_N: Tensor, scores_TK: Tensor
    ) -> None:
        """Add rows of one expert; ``slot_N`` is ``t * K + k`` of each."""
        add_expert_(
            self._sum_LEI[layer, expert],
            hidden_NI,
            self._weights(scores_TK, slot_N),
            self._down_norm_LEI[layer, expert],
        )

    def add_rows(self, layer: int, hidden_RI: Tensor, routing: Routing, scores_TK: Tensor) -> None:
        """Add the rows of all experts."""
        add_unit_sums_(
            self._sum_LEI[layer],
            hidden_RI,
            self._weights(scores_TK, routing.slot_R),
            routing.offsets_E,
            self._down_norm_LEI[layer],
        )

    def contributions(self) -> NDArray[np.float64]:
        """``sum_t w |a| ||d||`` of every unit ``[L, E, I]``, on the host.

        Raises:
            ValueError: if an expert's units said NaN or infinity.
        """
        sum_LEI = self._sum_LEI.cpu().numpy().copy()
        bad = ~np.isfinite(sum_LEI).all(axis=(1, 2))
        if bad.any():
            raise ValueError(f"the experts of layer {int(bad.argmax())} produced NaN")
        return sum_LEI

    def _weights(self, scores_TK: Tensor, slot_N: Tensor) -> Tensor:
        """Applied weight of rows ``[N]``, float32; 0 where the token is not counted."""
        score_N = scores_TK.reshape(-1).index_select(0, slot_N).float()
        return score_N * self._counted_T.index_select(0, slot_N // scores_TK.shape[1])


class LayerUnits:
    """Shows one layer's activations to a :class:`UnitAccumulator`."""

    def __init__(self, accumulator: UnitAccumulator, layer: int) -> None:
        self._accumulator = accumulator
        self._layer = layer

    def see_expert(self, expert: int, hidden_NI: Tensor, slot_N: Tensor, scores_TK: Tensor) -> None:
        """Activations of one expert's rows, as plain PyTorch computes them."""
        self._accumulator.add_expert(self._layer, expert, hidden_NI, slot_N, scores_TK)

    def see_rows(self, hidden_RI: Tensor, routing: Routing, scores_TK: Tensor) -> None:
        """Activations of all experts' rows, as the engine computes them."""
        self._accumulator.add_rows(self._layer, hidden_RI, routing, scores_TK)
