"""fp32 masters of a bf16 model, stepped by AdamW and, late in training, rounded to MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4
from nexus_cli.core.model.gpt_oss.mxfp4 import quantize_mxfp4

BETAS = (0.9, 0.95)


def is_packed_weight(name: str) -> bool:
    """Whether a parameter is one that the checkpoint holds as MXFP4."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def round_to_mxfp4(weight: Tensor) -> Tensor:
    """What a dense expert weight ``[E, in, out]`` becomes when packed and unpacked, in bf16."""
    blocks, scales = quantize_mxfp4(weight.transpose(1, 2))
    return dequantize_mxfp4(blocks, scales, torch.bfloat16).transpose(1, 2)


class MasterWeights:
    """Steps a bf16 model through fp32 copies of its parameters.

    With ``rounds_experts`` the forward sees experts rounded to MXFP4 (which bf16 holds exactly)
    while the step lands on the unrounded masters: the straight-through estimator, and the
    trained model is then the packed one.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._masters = [parameter.detach().float().clone() for parameter in self._parameters]
        named = list(zip(self._names, self._masters, strict=True))
        decayed = [master for name, master in named if _is_matrix(name)]
        plain = [master for name, master in named if not _is_matrix(name)]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain}]
        fused = self._masters[0].is_cuda
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=fused)
        self.rounds_experts = False

    def step(self, learning_rate: float, max_norm: float) -> Tensor:
        """Take one step from the model's gradients, clear them, and return their norm."""
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self._masters, max_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.write_back()
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the masters into the model."""
        torch._foreach_copy_(self._parameters, self._masters)
        if self.rounds_experts:
            for name, parameter, master in zip(
                self._names, self._parameters, self._masters, strict=True
            ):
                if is_packed_weight(name):
                    parameter.copy_(round_to_mxfp4(master))


def _is_matrix(name: str) -> bool:
    """Whether weight decay acts: not on vectors, nor on embeddings, which rare tokens need."""
    return not name.endswith(("bias", "sinks", "norm.weight", "embed_tokens.weight"))
