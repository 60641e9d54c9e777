"""Which parameters of the model train, by an allow-list of names."""

from __future__ import annotations

import re

from torch import nn

SHARED_EXPERT = re.compile(
    r"model\.layers\.\d+\.mlp\.shared_expert\."
    r"((gate|up|down)_proj\.(weight|bias)|output_gate)"
)
ROUTER = re.compile(r"model\.layers\.\d+\.mlp\.router\.(weight|bias)")


def trainable_names(model: nn.Module, *, train_router: bool = False) -> list[str]:
    """Names of the parameters that training may move: the shared experts, and the routers."""
    allowed = (SHARED_EXPERT, ROUTER) if train_router else (SHARED_EXPERT,)
    return [
        name
        for name, _ in model.named_parameters()
        if any(pattern.fullmatch(name) for pattern in allowed)
    ]
