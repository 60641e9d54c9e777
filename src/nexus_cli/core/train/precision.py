"""Which number format each part of a training run uses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def frozen_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format of the frozen weights: as named, or bf16 on a GPU and fp32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def promote(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Make the parameters ``names`` fp32 masters and freeze every other one.

    The model casts a master to its input's format where it is used, in recomputation too.

    Returns:
        The trainable parameters by name, in the model's order.

    Raises:
        ValueError: the model has no such parameter.
    """
    wanted = set(names)
    masters: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        parameter.requires_grad_(False)
        if name in wanted:
            owner, _, leaf = name.rpartition(".")
            masters[name] = nn.Parameter(parameter.float())
            setattr(model.get_submodule(owner), leaf, masters[name])
    if missing := sorted(wanted - masters.keys()):
        raise ValueError(f"the model has no parameter {', '.join(missing)}")
    return masters
