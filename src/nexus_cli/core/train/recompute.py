"""Gradient checkpointing: keep a layer's input and compute the layer again in the backward."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: nn.Module) -> int:
    """Make every decoder layer of ``model`` recompute itself in the backward pass.

    The layers act on it in training mode only, so that mode is set here: GPT-OSS has no dropout
    that it would turn on. Set layer by layer because the method of transformers that does this
    changed its name within version 5.

    Returns:
        How many layers do so.

    Raises:
        ValueError: the model has no such layer.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("no layer of this model can be recomputed")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    model.train()
    return len(layers)
