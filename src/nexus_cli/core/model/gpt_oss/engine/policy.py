"""Which backend multiplies with the packed experts: a choice by measured figures, or by name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nexus_cli.core.kernels.attention import KERNEL_HEAD_SIZES
from nexus_cli.core.kernels.router import MAX_EXPERTS, MAX_TOP_K
from nexus_cli.core.kernels.routing import Routing
from nexus_cli.core.model.gpt_oss.engine.products import (
    DequantProducts,
    FusedProducts,
    PackedWeights,
    Products,
    TorchProducts,
    Workspace,
)

Backend = Literal["auto", "torch", "dequant", "fused", "bf16"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# Measured on an H100 (docs/results.md, "Routed experts"): the average rows an expert from which
# decoding once and multiplying at cuBLAS speed wins over decoding in the product, and those from
# which weights that are decoded already win over both.
CROSSOVER_ROWS = 400
DECODED_ROWS = 96
# grouped_mm has a fast kernel on these; elsewhere it is a loop with a wait for the host.
GROUPED_MM_MAJORS = (9, 10)
KERNELS_CAPABILITY = (8, 0)  # bf16 products and the assembly that decodes


class AutoProducts:
    """``fused`` for few rows an expert, ``dequant`` for many; known from the shapes alone."""

    def __init__(self, weights: PackedWeights, workspace: Workspace) -> None:
        self._fused = FusedProducts(weights)
        self._dequant = DequantProducts(weights, workspace)

    def gate_up(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`~nexus_cli.core.model.gpt_oss.engine.products.Products`."""
        return self._for(routing).gate_up(x_TH, routing)

    def down(self, hidden_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`~nexus_cli.core.model.gpt_oss.engine.products.Products`."""
        return self._for(routing).down(hidden_RI, routing)

    def grad_down(self, grad_TH: Tensor, routing: Routing) -> Tensor:
        """See :class:`~nexus_cli.core.model.gpt_oss.engine.products.Products`."""
        return self._for(routing).grad_down(grad_TH, routing)

    def grad_gate_up(self, grad_RI: Tensor, routing: Routing) -> Tensor:
        """See :class:`~nexus_cli.core.model.gpt_oss.engine.products.Products`."""
        return self._for(routing).grad_gate_up(grad_RI, routing)

    def _for(self, routing: Routing) -> Products:
        few = prefers_fused(len(routing.slot_R), routing.num_experts)
        return self._fused if few else self._dequant


def prefers_fused(rows: int, experts: int) -> bool:
    """Whether decoding inside the product is faster, for this many rows in all."""
    return rows < CROSSOVER_ROWS * experts


def prefers_decoded(rows: int, experts: int) -> bool:
    """Whether weights kept in bf16 are faster than packed ones, for this many rows in all."""
    return rows >= DECODED_ROWS * experts


def resolve(backend: Backend, device: torch.device) -> Backend:
    """``auto`` as ``fused`` on a GPU whose ``grouped_mm`` is no fast kernel."""
    if backend != "auto" or device.type != "cuda":
        return backend
    return "auto" if fast_grouped_mm(device) else "fused"


def fast_grouped_mm(device: torch.device) -> bool:
    """Whether ``grouped_mm`` is one kernel on this GPU."""
    return torch.cuda.get_device_capability(device)[0] in GROUPED_MM_MAJORS


def kernels_run_on(device: torch.device) -> bool:
    """Whether the Triton kernels run on this GPU: an NVIDIA one, Ampere or later, with triton."""
    if torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= KERNELS_CAPABILITY


def shape_refused(config: Any) -> str | None:
    """What of a model's shape the kernels cannot hold, in words; ``None`` if they run it."""
    if config.head_dim not in KERNEL_HEAD_SIZES:
        sizes = ", ".join(map(str, KERNEL_HEAD_SIZES))
        return f"attention heads of {config.head_dim} numbers (the kernels take {sizes})"
    if config.num_experts_per_tok > MAX_TOP_K:
        return f"{config.num_experts_per_tok} experts a token (the kernels take {MAX_TOP_K})"
    if config.num_local_experts > MAX_EXPERTS:
        return f"{config.num_local_experts} experts a layer (the kernels take {MAX_EXPERTS})"
    return None


def make_products(backend: Backend, weights: PackedWeights, workspace: Workspace) -> Products:
    """Build the products of one layer.

    Raises:
        ValueError: the backend does not exist, or needs a CUDA device that the weights are not on.
    """
    if backend not in BACKENDS:
        raise ValueError(f"the experts' backend is one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "torch":
        return TorchProducts(weights)
    device = weights.gate_up_blocks.device
    backend = resolve(backend, device)
    if device.type != "cuda":
        raise ValueError(f"the experts' backend {backend} needs a CUDA device, not {device}")
    if backend == "fused" or backend == "bf16":  # bf16: until the engine decodes the layer
        return FusedProducts(weights)
    if backend == "dequant":
        return DequantProducts(weights, workspace)
    return AutoProducts(weights, workspace)


def describe(backend: Backend, tokens: int, top_k: int, experts: int) -> str:
    """What ``backend`` does with a micro-batch of this size, in a line for people."""
    rows = tokens * top_k / experts
    if backend != "auto":
        return f"experts: {backend}, as asked ({rows:,.0f} rows an expert)"
    chosen = "fused" if prefers_fused(tokens * top_k, experts) else "dequant"
    return (
        f"experts: {chosen} ({rows:,.0f} rows an expert; "
        f"fused below {CROSSOVER_ROWS}, dequant from there on)"
    )
