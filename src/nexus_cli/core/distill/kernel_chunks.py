"""Chunks of the head's loss on a GPU: products into buffers that are kept, kernels between."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_cli.core.distill.divergence import TeacherView
from nexus_cli.core.distill.projection import project
from nexus_cli.core.distill.teacher import DenseSignal
from nexus_cli.core.kernels.head_loss import Kept, head_loss_chunk

# Shape letters in this file: C positions of one chunk, H hidden size, V vocabulary, K teacher
# entries kept for each position.


def takes_kernels(head_VH: Tensor) -> bool:
    """Whether the kernels are due: a bfloat16 head on a CUDA device."""
    return head_VH.is_cuda and head_VH.dtype == torch.bfloat16


def backproject(dlogits_CV: Tensor, head_VH: Tensor) -> Tensor:
    """``[C, H]``. The kernels' products are summed in float32, over parts of V as well."""
    if takes_kernels(head_VH):
        return torch.mm(dlogits_CV.to(head_VH.dtype), head_VH, out_dtype=torch.float32)
    return dlogits_CV.to(head_VH.dtype) @ head_VH


class KernelChunks:
    """Chunks of the head's loss by kernels, all in the same buffers: the last chunk's is lost."""

    def __init__(self, rows: int, head_VH: Tensor, temperature: float, metrics: bool) -> None:
        shape = (rows, len(head_VH))
        self.logits_CV = head_VH.new_empty(shape, dtype=torch.float32)
        self.dlogits_CV = head_VH.new_empty(shape)
        self.teacher_CV: Tensor | None = None  # made when a dense teacher is met
        self.temperature = temperature
        self.metrics = metrics

    def chunk(
        self,
        hidden_CH: Tensor,
        head_VH: Tensor,
        labels_C: Tensor,
        weights: tuple[Tensor, Tensor],
        view: TeacherView | None,
    ) -> tuple[Tensor, Tensor]:
        """One chunk, as the PyTorch form in ``head.py`` computes it.

        Args:
            hidden_CH: the student's final hidden states.
            head_VH: the frozen head.
            labels_C: int64.
            weights: of cross entropy and KL, float32 ``[C]`` each.
            view: the teacher at these positions, or ``None``.

        Returns:
            Gradient of the logits ``[C, V]`` in the head's dtype, a buffer; and (CE, T^2 KL,
            entropy, agreement) ``[4, C]``, float32.
        """
        rows = len(labels_C)
        logits_CV = project(hidden_CH, head_VH, self.logits_CV[:rows])
        teacher: Tensor | Kept | None = None
        if isinstance(view, DenseSignal):
            if self.teacher_CV is None:
                self.teacher_CV = torch.empty_like(self.logits_CV)
            teacher = project(view.hidden_NH, head_VH, self.teacher_CV[:rows])
        elif view is not None:
            logprobs_CK = view.logprobs_CK.float().contiguous()
            teacher = Kept(view.ids_CK.contiguous(), logprobs_CK, view.tail_C.float())
        dlogits_CV = self.dlogits_CV[:rows]
        parts_4C = head_loss_chunk(
            logits_CV,
            labels_C,
            *weights,
            teacher,
            dlogits_CV,
            temperature=self.temperature,
            metrics=self.metrics,
        )
        return dlogits_CV, parts_4C
