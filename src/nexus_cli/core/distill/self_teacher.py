"""The student with its shared experts switched off: the original model, for one copy of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.teacher import DenseSignal


class SelfTeacher:
    """Gives the signal of the model that the student was made from, bit for bit.

    The switch is an argument of the forward, so no state is left set if a step fails, and
    recomputation under gradient checkpointing never sees it changed.

    Args:
        model: the student.
        router_logits: also give the routers' logits.
        frozen: with a trainable router, the original router tensors by their names in the
            model (:func:`frozen_routers`); they take the place of the trained ones in the
            teacher's forward alone.
    """

    def __init__(
        self,
        model: Any,
        *,
        router_logits: bool = False,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model = model
        self._router_logits = router_logits
        self._frozen = dict(frozen or {})

    @torch.no_grad()
    def signal(self, batch: Batch) -> DenseSignal:
        """The original model's view of ``batch``."""
        arguments = {
            "input_ids": batch.input_ids_BS,
            "position_ids": batch.position_ids_BS,
            "use_cache": False,
            "shared_experts": False,
            "output_router_logits": self._router_logits,
        }
        if self._frozen:
            out = functional_call(self._model.model, self._frozen, kwargs=arguments)
        else:
            out = self._model.model(**arguments)
        return DenseSignal(
            out.last_hidden_state.flatten(0, 1),
            tuple(out.router_logits) if self._router_logits else None,
        )


def frozen_routers(model: Any) -> dict[str, Tensor]:
    """Copies of the routers' tensors, by their names inside ``model.model``."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.model.named_parameters()
        if ".mlp.router." in name
    }
