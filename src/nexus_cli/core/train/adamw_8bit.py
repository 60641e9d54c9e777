"""AdamW in 6 bytes a number: bf16 weights with exact remainders, and 8-bit moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nexus_cli.core.kernels.adamw_8bit import (
    Factors,
    Moments,
    adamw_8bit_step,
    join_master,
    split_master,
)

REMAINDER = "remainder"


class AdamW8bit(torch.optim.Optimizer):
    """AdamW over bf16 parameters, whose masters are exact fp32 all the same, and fp32 ones.

    A bf16 parameter is the upper half of its fp32 master, kept by the model and used as it is;
    the lower half is an int16 remainder here, and both moments are 8-bit codes
    (:mod:`nexus_cli.core.kernels.adamw_8bit`). That is 6 bytes a number, where fp32 AdamW
    takes 12 and the model casts the weights besides. An fp32 parameter is stepped by PyTorch's
    AdamW; that is meant for small ones, such as biases and gates.

    Args:
        params: parameters or groups, bf16 or fp32.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Attributes:
        gradient_factor: what the next step multiplies the gradients of moving groups by,
            float32 ``[]``; ``None`` for 1. It saves clipping a pass over them.

    Raises:
        ValueError: a parameter has another format.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.gradient_factor: Tensor | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its state is made at once, as a master is incomplete without it."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = _fresh_state(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients as they are, times :attr:`gradient_factor`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            factor = self.gradient_factor if group["lr"] != 0 else None
            for parameter in moving:
                if parameter.dtype == torch.bfloat16:
                    self._step_split(group, parameter, factor)
            self._step_plain(group, [p for p in moving if p.dtype == torch.float32], factor)
        self.gradient_factor = None
        return loss

    def master(self, parameter: Tensor) -> Tensor:
        """The exact fp32 value of ``parameter``; of a bf16 one, a new tensor."""
        if parameter.dtype == torch.float32:
            return parameter.detach()
        return join_master(parameter.detach(), self.state[parameter][REMAINDER])

    @torch.no_grad()
    def set_master(self, parameter: Tensor, value: Tensor) -> None:
        """Make ``value``, fp32, the exact value of ``parameter``."""
        if parameter.dtype == torch.float32:
            parameter.copy_(value)
            return
        weight, remainder = split_master(value.to(parameter.device, torch.float32))
        parameter.copy_(weight)
        self.state[parameter][REMAINDER].copy_(remainder)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state of another such optimizer, in the formats that it has.

        The base class would turn codes and scales into the parameters' bf16.
        """
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            self.state[parameter] = {
                key: value.to("cpu" if _counts_on_cpu(parameter, key) else parameter.device)
                for key, value in state_dict["state"][index].items()
            }

    def _step_split(self, group: dict[str, Any], parameter: Tensor, factor: Tensor | None) -> None:
        state = self.state[parameter]
        state["step"] += 1
        factors = Factors.at(
            int(state["step"]),
            rate=group["lr"],
            weight_decay=group["weight_decay"],
            betas=group["betas"],
            epsilon=group["eps"],
        )
        moments = Moments(*(state[key] for key in Moments._fields))
        assert parameter.grad is not None
        adamw_8bit_step(
            parameter.detach(), state[REMAINDER], moments, parameter.grad, factors, factor
        )

    def _step_plain(
        self, group: dict[str, Any], parameters: list[Tensor], factor: Tensor | None
    ) -> None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not grads:
            return
        if factor is not None:
            torch._foreach_mul_(grads, factor)
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=all(parameter.is_cuda for parameter in parameters) or None,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    if parameter.dtype == torch.float32:
        return {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if parameter.dtype != torch.bfloat16:
        raise ValueError(f"adamw-8bit takes bfloat16 and float32 parameters, not {parameter.dtype}")
    moments = Moments.zeros(parameter.numel(), parameter.device)
    return {
        "step": torch.zeros(()),
        REMAINDER: torch.zeros_like(parameter, dtype=torch.int16),
        **moments._asdict(),
    }


def _counts_on_cpu(parameter: Tensor, key: str) -> bool:
    """Whether this is a step number that Python reads; PyTorch's fused AdamW reads its own."""
    return key == "step" and parameter.dtype == torch.bfloat16
