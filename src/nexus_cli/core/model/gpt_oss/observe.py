"""Show a loaded model's expert activations to whoever takes statistics of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nexus_cli.core.kernels.routing import Routing
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import (
    NexusGptOssForCausalLM,
    dequantize_mxfp4,
)

# Shape letters in this file: L layers, E experts, I expert width, R routed rows sorted by expert,
# N rows of one expert, T tokens, K experts a token, H hidden.


class ExpertsObserver(Protocol):
    """What a layer's routed experts call in every forward pass; it must not change a tensor."""

    def see_expert(self, expert: int, hidden_NI: Tensor, slot_N: Tensor, scores_TK: Tensor) -> None:
        """Activations of one expert's rows, from plain PyTorch; ``slot`` is ``t * K + k``."""
        ...

    def see_rows(self, hidden_RI: Tensor, routing: Routing, scores_TK: Tensor) -> None:
        """Activations of all experts' rows, from the engine."""
        ...


def observe_experts(model: NexusGptOssForCausalLM, observers: Sequence[ExpertsObserver]) -> None:
    """Let each layer's experts call its observer from now on, engine or not.

    Args:
        model: as :func:`~nexus_cli.core.model.gpt_oss.loading.load_model` gives it.
        observers: one for each layer.
    """
    if model.model.engine is not None:
        model.model.engine.observe(observers)
        return
    for layer, observer in zip(model.model.layers, observers, strict=True):
        layer.mlp.experts.observer = observer


@torch.no_grad()
def down_norms(model: NexusGptOssForCausalLM) -> Tensor:
    """Length of every hidden unit's down column ``[L, E, I]``, float32, on the model's device.

    Only while the experts are packed: before the engine keeps any of them decoded.
    """
    return torch.stack([_layer_norms(layer.mlp.experts) for layer in model.model.layers])


def _layer_norms(experts: Any) -> Tensor:
    """One expert is decoded at a time."""
    packed = zip(experts.down_proj_blocks, experts.down_proj_scales, strict=True)
    return torch.stack(
        [dequantize_mxfp4(blocks, scales, torch.float32).norm(dim=0) for blocks, scales in packed]
    )
