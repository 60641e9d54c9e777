"""Which number format each part of a training run uses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPLIT_FROM = 4096  # numbers; smaller tensors, such as biases and gates, stay fp32


def frozen_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format of the frozen weights: as named, or bf16 on a GPU and fp32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def promote(
    model: nn.Module, names: Iterable[str], *, split: bool = False
) -> dict[str, nn.Parameter]:
    """Make the parameters ``names`` fp32 masters and freeze every other one.

    The model casts a master to its input's format where it is used, in recomputation too.

    Args:
        model: any.
        names: of the parameters that train.
        split: keep those of :data:`SPLIT_FROM` numbers or more in bf16, for an optimizer that
            holds what is missing to fp32 (``adamw-8bit``). A bf16 model uses them without a
            cast or a copy. One that is loaded in fp32 is rounded to bf16 here, once; what Nexus
            writes is bf16 already, so nothing is lost.

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
            is_split = split and parameter.numel() >= SPLIT_FROM
            dtype = torch.bfloat16 if is_split else torch.float32
            masters[name] = nn.Parameter(parameter.detach().to(dtype))
            setattr(model.get_submodule(owner), leaf, masters[name])
    if missing := sorted(wanted - masters.keys()):
        raise ValueError(f"the model has no parameter {', '.join(missing)}")
    return masters
