"""AdamW over the fp32 master weights of what trains: groups, rates and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

Kind = Literal["shared", "shared_bias", "gate", "router", "router_bias"]
KINDS: tuple[Kind, ...] = ("shared", "shared_bias", "gate", "router", "router_bias")


@dataclass(frozen=True)
class Rates:
    """Learning rates of one step, a kind of parameter each."""

    shared: float
    gate: float
    router: float
    router_bias: float

    def of(self, kind: Kind) -> float:
        """The rate of one group."""
        return self.shared if kind == "shared_bias" else float(getattr(self, kind))


def kind_of(name: str) -> Kind:
    """Which group a trainable tensor belongs to, by its name in the checkpoint.

    Raises:
        ValueError: the tensor is none that Nexus trains.
    """
    if name.endswith(".mlp.shared_expert.output_gate"):
        return "gate"
    if ".mlp.shared_expert." in name:
        return "shared_bias" if name.endswith(".bias") else "shared"
    if name.endswith(".mlp.router.weight"):
        return "router"
    if name.endswith(".mlp.router.bias"):
        return "router_bias"
    raise ValueError(f"{name} is not a tensor that Nexus trains")


def build_optimizer(
    named: Mapping[str, nn.Parameter],
    *,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with one group a kind of parameter.

    Only matrices decay: a gate or a bias pulled to zero is a changed function, not a simpler
    one. The rates start at zero; :func:`set_rates` gives them before every step, so no schedule
    state exists that a resumed run could miss.

    Args:
        named: the trainable parameters by their names in the checkpoint.
        weight_decay: of the shared expert's and the router's matrices.
        betas: decay of the first and second moment.
        epsilon: added to the root of the second moment.

    Raises:
        ValueError: there is nothing to train, or a parameter is not fp32: in bf16 an update
            smaller than 1/256 of a weight is lost.
    """
    if not named:
        raise ValueError("there is nothing to train")
    grouped: dict[Kind, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} trains in {parameter.dtype}; masters must be float32")
        grouped[kind_of(name)].append(parameter)
    decays = {"shared": weight_decay, "router": weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": parameters, "name": kind, "lr": 0.0, "weight_decay": decays.get(kind, 0.0)}
        for kind, parameters in grouped.items()
        if parameters
    ]
    on_gpu = all(parameter.is_cuda for parameter in named.values())
    return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=on_gpu or None)


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Give every group its learning rate for the step to come; 0 freezes a group exactly."""
    for group in optimizer.param_groups:
        group["lr"] = rates.of(group["name"])


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale the gradients so that their joint norm is at most ``max_norm``.

    To be called after the gradients are summed over micro-batches and ranks, so that the norm
    is the true one. Groups frozen by a rate of 0 are left out: a gradient that moves nothing
    must not shrink those that do.

    Returns:
        The norm before clipping, float32 ``[]``; not finite if any gradient is not.
    """
    moving = [
        parameter
        for group in optimizer.param_groups
        if group["lr"] != 0
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    norm = get_total_norm([parameter.grad for parameter in moving if parameter.grad is not None])
    clip_grads_with_norm_(moving, max_norm, norm)
    return norm
