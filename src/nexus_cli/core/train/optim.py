"""AdamW over the fp32 master weights of what trains: groups, rates, clipping, exact values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from nexus_cli.core.train.adamw_8bit import AdamW8bit

Kind = Literal["shared", "shared_bias", "gate", "router", "router_bias"]
OptimizerKind = Literal["adamw", "adamw-8bit"]
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
    optimizer: OptimizerKind = "adamw",
) -> torch.optim.AdamW | AdamW8bit:
    """AdamW (Loshchilov and Hutter, 2019) with one group a kind of parameter.

    Only matrices decay: a gate or a bias pulled to zero is a changed function, not a simpler
    one. The rates start at zero; :func:`set_rates` gives them before every step, so no schedule
    state exists that a resumed run could miss.

    Args:
        named: the trainable parameters by their names in the checkpoint.
        weight_decay: of the shared expert's and the router's matrices.
        betas: decay of the first and second moment.
        epsilon: added to the root of the second moment.
        optimizer: ``adamw``, or ``adamw-8bit`` (:class:`AdamW8bit`), which takes bf16 parameters
            too and keeps the rest of their masters itself.

    Raises:
        ValueError: there is nothing to train, or a parameter is not fp32: in bf16 alone an update
            smaller than 1/256 of a weight is lost.
    """
    if not named:
        raise ValueError("there is nothing to train")
    grouped: dict[Kind, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    for name, parameter in named.items():
        if optimizer == "adamw" and parameter.dtype != torch.float32:
            raise ValueError(f"{name} trains in {parameter.dtype}; masters must be float32")
        grouped[kind_of(name)].append(parameter)
    decays = {"shared": weight_decay, "router": weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": parameters, "name": kind, "lr": 0.0, "weight_decay": decays.get(kind, 0.0)}
        for kind, parameters in grouped.items()
        if parameters
    ]
    if optimizer == "adamw-8bit":
        return AdamW8bit(groups, betas=betas, eps=epsilon)
    on_gpu = all(parameter.is_cuda for parameter in named.values())
    return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=on_gpu or None)


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Give every group its learning rate for the step to come; 0 freezes a group exactly."""
    for group in optimizer.param_groups:
        group["lr"] = rates.of(group["name"])


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale the gradients so that their joint norm is at most ``max_norm``.

    :class:`AdamW8bit` gets the factor and applies it in its step; ``.grad`` stays as it is. To be
    called after the gradients are summed over micro-batches and ranks, so that the norm
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
    grads = [parameter.grad for parameter in moving if parameter.grad is not None]
    # In float32 whatever the gradients are in: a norm in bf16 has three digits.
    norms = torch.stack(torch._foreach_norm(grads, 2.0, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(norms)
    if isinstance(optimizer, AdamW8bit):
        optimizer.gradient_factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    else:
        clip_grads_with_norm_(moving, max_norm, norm)
    return norm


def read_master(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """The exact fp32 value of a trained parameter; the parameter itself where it is that."""
    if isinstance(optimizer, AdamW8bit):
        return optimizer.master(parameter)
    return parameter.detach()


@torch.no_grad()
def write_master(optimizer: torch.optim.Optimizer, parameter: Tensor, value: Tensor) -> None:
    """Give a trained parameter an exact fp32 value."""
    if isinstance(optimizer, AdamW8bit):
        optimizer.set_master(parameter, value)
    else:
        parameter.copy_(value)
