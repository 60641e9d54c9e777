"""Which parameters of the model train, by an allow-list of names."""

from __future__ import annotations

import re

from torch import nn

SHARED_EXPERT = re.compile(
    r"model\.layers\.\d+\.mlp\.shared_expert\."
    r"((gate|up|down)_proj\.(weight|bias)|output_gate)"
)
ROUTER = re.compile(r"model\.layers\.\d+\.mlp\.router\.(weight|bias)")
ROUTER_BIAS = re.compile(r"model\.layers\.\d+\.mlp\.router\.bias")


def trains(name: str, *, train_router: bool = False, train_router_bias: bool = False) -> bool:
    """Whether training may move the tensor of this name.

    Args:
        name: in the checkpoint.
        train_router: the routers train, weights and biases.
        train_router_bias: the routers' biases train.
    """
    if SHARED_EXPERT.fullmatch(name):
        return True
    router = ROUTER if train_router else ROUTER_BIAS if train_router_bias else None
    return router is not None and router.fullmatch(name) is not None


def trainable_names(
    model: nn.Module, *, train_router: bool = False, train_router_bias: bool = False
) -> list[str]:
    """Names of the parameters that training may move: the shared experts, and the routers."""
    return [
        name
        for name, _ in model.named_parameters()
        if trains(name, train_router=train_router, train_router_bias=train_router_bias)
    ]
