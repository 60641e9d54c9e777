"""Ask a model about packed sequences, and lay the answer out as rows of a teacher store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.topk import TopK, top_k
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.core.router.batching import to_device
from nexus_cli.errors import ArtifactError
from nexus_cli.io.teacher_shards import StoreRows

# Shape letters in this file: B sequences, S positions, K kept entries, H hidden size,
# M positions whose next token is a target.


@dataclass(frozen=True)
class Answer:
    """What a model says of a batch; on its way to the host, if a GPU was asked.

    Attributes:
        batch: what it was asked about.
        held_BS: True where the next token is a target, on the host.
        kept: of those positions ``M``, on the host; ids are int32. To be read when ``there``.
        there: the copy to the host has ended; ``None`` if nothing is copied.
    """

    batch: Batch
    held_BS: Tensor
    kept: TopK
    there: torch.cuda.Event | None

    def rows(self) -> StoreRows:
        """Wait for the answer, and lay it out.

        Raises:
            ArtifactError: the model gives no numbers.
        """
        if self.there is not None:
            self.there.synchronize()
        kept, held_BS, batch = self.kept, self.held_BS, self.batch
        if not kept.nll_N.isfinite().all():
            raise ArtifactError("the teacher gives probabilities that are not numbers")
        return StoreRows(
            input_ids_BS=batch.input_ids_BS.numpy().astype(np.int32),
            position_ids_BS=batch.position_ids_BS.numpy().astype(np.int32),
            loss_mask_BS=batch.loss_mask_BS.numpy(),
            source_B=batch.source_B.numpy().astype(np.int16),
            ids_BSK=_spread(held_BS, kept.ids_NK, 0),
            logprobs_BSK=_spread(held_BS, kept.logprobs_NK, -torch.inf),
            tail_BS=_spread(held_BS, kept.tail_logprob_N, torch.nan),
            nll_BS=_spread(held_BS, kept.nll_N, 0.0),
        )


def ask(model: NexusGptOssForCausalLM, batch: Batch, k: int) -> Answer:
    """Ask ``model`` about ``batch``, at the positions whose next token is a target.

    A GPU is given the work and not waited for: ask about the next batch before reading the rows.

    Args:
        model: the teacher, on any device; it runs as it is, with the shared experts it has.
        batch: sequences, on the CPU.
        k: entries kept a position.
    """
    head_VH = model.lm_head.weight
    device = head_VH.device
    held_BS = torch.zeros_like(batch.loss_mask_BS)
    held_BS[:, :-1] = batch.loss_mask_BS[:, 1:]
    labels_M = batch.input_ids_BS[:, 1:][batch.loss_mask_BS[:, 1:]]
    place_M = held_BS.flatten().nonzero()[:, 0]  # on the host: a mask on the device is waited for
    with torch.inference_mode():
        hidden_BSH = model.model(
            input_ids=to_device(batch.input_ids_BS, device),
            position_ids=to_device(batch.position_ids_BS, device),
            use_cache=False,
        ).last_hidden_state
        hidden_MH = hidden_BSH.flatten(0, 1).index_select(0, to_device(place_M, device))
        kept, there = _on_host(top_k(hidden_MH, head_VH, to_device(labels_M, device), k))
    return Answer(batch, held_BS, kept, there)


def _on_host(kept: TopK) -> tuple[TopK, torch.cuda.Event | None]:
    """Start the copies; from a GPU they go to pinned memory, and the event says when they end."""
    tensors = kept.ids_NK.to(torch.int32), kept.logprobs_NK, kept.tail_logprob_N, kept.nll_N
    copies = TopK(*(tensor.to("cpu", non_blocking=True) for tensor in tensors))
    if not kept.nll_N.is_cuda:
        return copies, None
    there = torch.cuda.current_stream(kept.nll_N.device).record_event()
    return copies, there


def _spread(held_BS: Tensor, values_MX: Tensor, filler: float) -> NDArray[Any]:
    """Values of the held positions at their places, ``filler`` elsewhere: ``[B, S, ...]``."""
    spread = torch.full((*held_BS.shape, *values_MX.shape[1:]), filler, dtype=values_MX.dtype)
    spread[held_BS] = values_MX
    array: NDArray[Any] = spread.numpy()
    return array
