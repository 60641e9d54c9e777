"""A teacher that is a model of its own, on a device of its own."""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
from torch import Tensor

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.teacher import DenseSignal

# Shape letters in this file: V vocabulary, H hidden size.

ROWS = 16_384  # of the head, compared at a time


class ModelTeacher:
    """Runs the original model and sends its final hidden states to the student's device.

    Hidden states cross where logits would cost 70 times as much; the student's frozen head
    turns them into the teacher's logits, which is right only if both heads are equal.

    Args:
        model: the original model, in evaluation mode, on its device.
        student: the student; its head is compared and its device is where signals go.
        router_logits: also send the routers' logits.

    Raises:
        ValueError: the two heads differ.
    """

    def __init__(self, model: Any, student: Any, *, router_logits: bool = False) -> None:
        if not same_head(model.lm_head.weight, student.lm_head.weight):
            raise ValueError(
                "the teacher's output head differs from the student's: "
                "the student was not made from this model"
            )
        self._model = model
        self._device: torch.device = model.lm_head.weight.device
        self._student_device = student.lm_head.weight.device
        self._router_logits = router_logits
        self._one_at_a_time = Lock()  # layers share a buffer, and a thread may run ahead

    @property
    def device(self) -> torch.device:
        """Where the original model runs."""
        return self._device

    @torch.no_grad()
    def signal(self, batch: Batch) -> DenseSignal:
        """The original model's view of ``batch``, on the student's device."""
        with self._one_at_a_time:
            return self._signal(batch)

    def _signal(self, batch: Batch) -> DenseSignal:
        out = self._model.model(
            input_ids=batch.input_ids_BS.to(self._device, non_blocking=True),
            position_ids=batch.position_ids_BS.to(self._device, non_blocking=True),
            use_cache=False,
            shared_experts=False,
            output_router_logits=self._router_logits,
        )
        logits = out.router_logits if self._router_logits else None
        return DenseSignal(
            self._send(out.last_hidden_state.flatten(0, 1)),
            None if logits is None else tuple(map(self._send, logits)),
        )

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._student_device, non_blocking=True)


def same_head(teacher_VH: Tensor, student_VH: Tensor) -> bool:
    """Whether two output heads hold the same numbers, compared in pieces on the second's device."""
    if teacher_VH.shape != student_VH.shape:
        return False
    pairs = zip(torch.split(teacher_VH, ROWS), torch.split(student_VH, ROWS), strict=True)
    return all(torch.equal(theirs.to(ours.device, ours.dtype), ours) for theirs, ours in pairs)
