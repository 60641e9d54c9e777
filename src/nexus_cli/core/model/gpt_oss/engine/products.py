"""The four products with frozen experts, one class a way to get at the packed weights.

The routed block is written once (``experts.py``) over these. Rows are sorted by expert, biases are
added elsewhere, and no product has a weight gradient: the experts are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_cli.core.kernels.mxfp4_decode import decode_into
from nexus_cli.core.kernels.mxfp4_matmul import (
    matmul_rows,
    matmul_rows_torch,
    matmul_rows_transposed,
    matmul_rows_transposed_torch,
)
from nexus_cli.core.kernels.routing import Routing
from nexus_cli.core.kernels.rows import spread_rows

# Shape letters in this file: T tokens, R routed rows, E experts, H hidden, I expert width,
# N output and K input features of a packed weight.


@dataclass(frozen=True)
class PackedWeights:
    """One layer's routed experts as the checkpoint holds them.

    Attributes:
        gate_up_blocks: uint8 ``[E, 2I, H/32, 16]``; gate and up rows alternate.
        gate_up_scales: uint8 ``[E, 2I, H/32]``.
        gate_up_bias: ``[E, 2I]``.
        down_blocks: uint8 ``[E, H, I/32, 16]``.
        down_scales: uint8 ``[E, H, I/32]``.
        down_bias: ``[E, H]``.
        limit: of the clamped SwiGLU.
        small_scales: whether every scale byte is known to be at most 128.
    """

    gate_up_blocks: Tensor
    gate_up_scales: Tensor
    gate_up_bias: Tensor
    down_blocks: Tensor
    down_scales: Tensor
    down_bias: Tensor
    limit: float
    small_scales: bool = False

    @property
    def gate_up(self) -> tuple[Tensor, Tensor]:
        """Blocks and scales of gate and up."""
        return self.gate_up_blocks, self.gate_up_scales

    @property
    def down(self) -> tuple[Tensor, Tensor]:
        """Blocks and scales of down."""
        return self.down_blocks, self.down_scales


class Products(Protocol):
    """Products of rows, sorted by expert, with each row's own expert."""

    def gate_up(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """``x[token] W_gate_up^T``, ``[R, 2I]``."""
        ...

    def down(self, hidden_RI: Tensor, routing: Routing) -> Tensor:
        """``hidden W_down^T``, ``[R, H]``."""
        ...

    def grad_down(self, grad_TH: Tensor, routing: Routing) -> Tensor:
        """``grad[token] W_down``, ``[R, I]``."""
        ...

    def grad_gate_up(self, grad_RI: Tensor, routing: Routing) -> Tensor:
        """``grad W_gate_up``, ``[R, H]``."""
        ...


class TorchProducts:
    """Plain PyTorch on any device, one expert decoded at a time: the oracle.

    The row counts go to the host, so a GPU waits for them in every product.
    """

    def __init__(self, weights: PackedWeights) -> None:
        self._weights = weights

    def gate_up(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        return matmul_rows_torch(x_TH, *self._weights.gate_up, routing.offsets_E, routing.token_R)

    def down(self, hidden_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        return matmul_rows_torch(hidden_RI, *self._weights.down, routing.offsets_E, None)

    def grad_down(self, grad_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        places = routing.offsets_E, routing.token_R
        return matmul_rows_transposed_torch(grad_TH, *self._weights.down, *places)

    def grad_gate_up(self, grad_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        packed = self._weights.gate_up
        return matmul_rows_transposed_torch(grad_RI, *packed, routing.offsets_E, None)


class FusedProducts:
    """Triton kernels that decode inside the product: each packed byte is read and nothing written.

    Best where experts have few rows: a weight is decoded once for every tile of rows.
    """

    def __init__(self, weights: PackedWeights) -> None:
        self._weights = weights

    def gate_up(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        packed, small = self._weights.gate_up, self._weights.small_scales
        places = routing.offsets_E, routing.token_R
        return matmul_rows(x_TH, *packed, *places, small_scales=small)

    def down(self, hidden_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        packed, small = self._weights.down, self._weights.small_scales
        return matmul_rows(hidden_RI, *packed, routing.offsets_E, None, small_scales=small)

    def grad_down(self, grad_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        packed, small = self._weights.down, self._weights.small_scales
        places = routing.offsets_E, routing.token_R
        return matmul_rows_transposed(grad_TH, *packed, *places, small_scales=small)

    def grad_gate_up(self, grad_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        packed, small = self._weights.gate_up, self._weights.small_scales
        return matmul_rows_transposed(grad_RI, *packed, routing.offsets_E, None, small_scales=small)


class Workspace:
    """One bf16 buffer that every layer decodes into, in the order of the stream.

    Nothing keeps a decoded weight for later, so a buffer may be overwritten as soon as the
    product that reads it is enqueued.

    Args:
        chunk: experts decoded at a time; ``None`` for all of them. A smaller number saves memory
            and costs a wait for the row counts in every product.
    """

    def __init__(self, chunk: int | None = None) -> None:
        self.chunk = chunk
        self._buffer: Tensor | None = None

    def take(self, blocks: Tensor) -> Tensor:
        """A bf16 ``[experts, N, K]`` to decode ``blocks`` into; what it held before is gone."""
        experts, rows, groups, _ = blocks.shape
        size = experts * rows * groups * 32
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None  # freed first: both would not fit where memory is tight
            self._buffer = torch.empty(size, dtype=torch.bfloat16, device=blocks.device)
        return self._buffer[:size].view(experts, rows, groups * 32)


class DequantProducts:
    """Decode into a reused bf16 buffer, then ``torch.nn.functional.grouped_mm``.

    Best where experts have many rows: decoding moves 2.5 bytes a weight, whatever the rows.
    """

    def __init__(self, weights: PackedWeights, workspace: Workspace | None = None) -> None:
        self._weights = weights
        self._workspace = workspace or Workspace()

    def gate_up(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        x_RH = spread_rows(x_TH, routing)
        return self._product(x_RH, self._weights.gate_up, routing, transpose=True)

    def down(self, hidden_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        return self._product(hidden_RI, self._weights.down, routing, transpose=True)

    def grad_down(self, grad_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        grad_RH = spread_rows(grad_TH, routing)
        return self._product(grad_RH, self._weights.down, routing, transpose=False)

    def grad_gate_up(self, grad_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        return self._product(grad_RI, self._weights.gate_up, routing, transpose=False)

    def _product(
        self, rows: Tensor, packed: tuple[Tensor, Tensor], routing: Routing, *, transpose: bool
    ) -> Tensor:
        blocks, scales = packed
        chunk = self._workspace.chunk
        if chunk is None or chunk >= len(blocks):
            weight_ENK = self._workspace.take(blocks)
            decode_into(blocks, scales, weight_ENK)
            return _grouped(rows, weight_ENK, routing.offsets_E, transpose=transpose)
        features = blocks.shape[1] if transpose else blocks.shape[2] * 32
        out = rows.new_empty(len(rows), features)
        ends = [0, *routing.offsets_E.tolist()]
        for first in range(0, len(blocks), chunk):
            experts = slice(first, min(first + chunk, len(blocks)))
            span = slice(ends[experts.start], ends[experts.stop])
            if span.start == span.stop:
                continue
            weight_ENK = self._workspace.take(blocks[experts])
            decode_into(blocks[experts], scales[experts], weight_ENK)
            offsets = routing.offsets_E[experts] - span.start
            out[span] = _grouped(rows[span], weight_ENK, offsets, transpose=transpose)
        return out


@dataclass(frozen=True)
class DecodedWeights:
    """One layer's routed experts, decoded: gate_up ``[E, 2I, H]`` and down ``[E, H, I]``, bf16."""

    gate_up_ENK: Tensor
    down_ENK: Tensor

    @classmethod
    def of(cls, weights: PackedWeights) -> DecodedWeights:
        """Decode a layer into memory of its own."""
        return cls(_decoded(*weights.gate_up), _decoded(*weights.down))

    @property
    def nbytes(self) -> int:
        """Memory that both take."""
        return self.gate_up_ENK.nbytes + self.down_ENK.nbytes


class Bf16Products:
    """``grouped_mm`` over weights that stay decoded: 2 bytes a weight instead of 0.53."""

    def __init__(self, weights: PackedWeights | DecodedWeights) -> None:
        decoded = DecodedWeights.of(weights) if isinstance(weights, PackedWeights) else weights
        self.decoded = decoded

    def gate_up(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        x_RH = spread_rows(x_TH, routing)
        return _grouped(x_RH, self.decoded.gate_up_ENK, routing.offsets_E, transpose=True)

    def down(self, hidden_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        return _grouped(hidden_RI, self.decoded.down_ENK, routing.offsets_E, transpose=True)

    def grad_down(self, grad_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        grad_RH = spread_rows(grad_TH, routing)
        return _grouped(grad_RH, self.decoded.down_ENK, routing.offsets_E, transpose=False)

    def grad_gate_up(self, grad_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`Products`."""
        return _grouped(grad_RI, self.decoded.gate_up_ENK, routing.offsets_E, transpose=False)


def _grouped(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, *, transpose: bool) -> Tensor:
    """One buffer serves both directions: its transpose is a view that the kernel takes as it is."""
    weight = weight_ENK.transpose(-2, -1) if transpose else weight_ENK
    return F.grouped_mm(rows, weight, offs=offsets_E)


def _decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, rows, groups * 32, dtype=torch.bfloat16, device=blocks.device)
    decode_into(blocks, scales, out)
    return out
