"""Routing: keeping every expert in use while training, and counting who is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter


class RouterTap:
    """Collects the router logits of one forward, a ``[tokens, experts]`` tensor a layer.

    Through hooks of our own: transformers' recorder multiplies its loss by the shipped
    coefficient of 0.9 and mixes all layers into one distribution.
    """

    def __init__(self, model: nn.Module) -> None:
        self.logits: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, GptOssTopKRouter):
                module.register_forward_hook(self._keep)

    def take(self) -> list[Tensor]:
        """The logits since the last call."""
        taken = list(self.logits)
        self.logits.clear()
        return taken

    def _keep(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        self.logits.append(output[0])


def balance_loss(layers: list[Tensor], top_k: int) -> Tensor:
    """The Switch load-balance term, averaged over layers; 1 when every expert has its share."""
    losses = []
    for logits in layers:
        probabilities = logits.float().softmax(-1)
        load = expert_load(logits, top_k) / (logits.shape[0] * top_k)
        losses.append(logits.shape[-1] * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def expert_load(logits: Tensor, top_k: int) -> Tensor:
    """How many tokens chose each expert, fp32 ``[experts]``, without a gradient."""
    chosen = logits.detach().topk(top_k, dim=-1).indices
    load = torch.zeros(logits.shape[-1], device=logits.device)
    ones = torch.ones(chosen.numel(), device=logits.device)
    return load.index_add_(0, chosen.flatten(), ones)


class RoutingCounter:
    """Adds up, over batches, each layer's load and how sharply it chooses."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._loads: list[Tensor] = []
        self._mass: list[Tensor] = []
        self._tokens = 0

    @torch.no_grad()
    def add(self, layers: list[Tensor], counted: Tensor) -> None:
        """Count the tokens of one forward where ``counted`` (bool ``[tokens]``) holds."""
        loads = [expert_load(logits[counted], self._top_k).double() for logits in layers]
        sharp = [
            logits[counted].float().softmax(-1).topk(self._top_k).values.sum(0).double()
            for logits in layers
        ]
        self._loads = _added(self._loads, loads)
        self._mass = _added(self._mass, sharp)
        self._tokens += int(counted.sum())

    def report(self) -> list[dict[str, Any]]:
        """A dict a layer: loads as a multiple of the even share, and the top-k probabilities."""
        layers = []
        for load, mass in zip(self._loads, self._mass, strict=True):
            relative = load / load.mean()
            layers.append(
                {
                    "load_min": round(float(relative.min()), 3),
                    "load_max": round(float(relative.max()), 3),
                    "load": [round(value, 3) for value in relative.tolist()],
                    "top_k_probability": [round(v, 4) for v in (mass / self._tokens).tolist()],
                }
            )
        return layers


def _added(total: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    if not total:
        return more
    return [a + b for a, b in zip(total, more, strict=True)]
