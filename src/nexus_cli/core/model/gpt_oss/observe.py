"""Show a loaded model's expert activations to whoever takes statistics of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Length of every hidden unit's down column ``[L, E, I]``, float32, on the model's device."""
    engine = model.model.engine
    found = []
    for index, layer in enumerate(model.model.layers):
        decoded_EHI = None if engine is None else engine.decoded_down(index)
        downs = _decode(layer.mlp.experts) if decoded_EHI is None else decoded_EHI
        found.append(torch.stack([down_HI.float().norm(dim=0) for down_HI in downs]))
    return torch.stack(found)


def _decode(experts: Any) -> Iterator[Tensor]:
    """Down projections ``[H, I]`` of packed experts, one in memory at a time."""
    for blocks, scales in zip(experts.down_proj_blocks, experts.down_proj_scales, strict=True):
        yield dequantize_mxfp4(blocks, scales, torch.float32)
