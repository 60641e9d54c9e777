"""Ask a model about packed sequences, and lay the answer out as rows of a teacher store."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.topk import top_k
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.errors import ArtifactError, ResourceError
from nexus_cli.io.teacher_shards import StoreRows

# Shape letters in this file: B sequences, S positions, K kept entries, H hidden size,
# M positions whose next token is a target.


def teacher_rows(model: NexusGptOssForCausalLM, batch: Batch, k: int) -> StoreRows:
    """What ``model`` says of ``batch``, at the positions whose next token is a target.

    Args:
        model: the teacher, on any device; it runs as it is, with the shared experts it has.
        batch: sequences, on the CPU.
        k: entries kept a position.

    Raises:
        ResourceError: the batch does not fit in the device's memory.
        ArtifactError: the model gives no numbers.
    """
    head_VH = model.lm_head.weight
    held_BS = torch.zeros_like(batch.loss_mask_BS)
    held_BS[:, :-1] = batch.loss_mask_BS[:, 1:]
    labels_M = batch.input_ids_BS[:, 1:][batch.loss_mask_BS[:, 1:]]
    try:
        with torch.inference_mode():
            hidden_BSH = model.model(
                input_ids=batch.input_ids_BS.to(head_VH.device),
                position_ids=batch.position_ids_BS.to(head_VH.device),
                use_cache=False,
            ).last_hidden_state
            hidden_MH = hidden_BSH[held_BS.to(head_VH.device)]
            kept = top_k(hidden_MH, head_VH, labels_M.to(head_VH.device), k)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the teacher does not fit on {head_VH.device} with {len(batch)} sequences a batch",
            hint="use a smaller --batch-size or --seq-len",
        ) from error
    if not kept.nll_N.isfinite().all():
        raise ArtifactError("the teacher gives probabilities that are not numbers")
    return StoreRows(
        input_ids_BS=batch.input_ids_BS.numpy().astype(np.int32),
        position_ids_BS=batch.position_ids_BS.numpy().astype(np.int32),
        loss_mask_BS=batch.loss_mask_BS.numpy(),
        source_B=batch.source_B.numpy().astype(np.int16),
        ids_BSK=_spread(held_BS, kept.ids_NK.to(torch.int32), 0),
        logprobs_BSK=_spread(held_BS, kept.logprobs_NK, -torch.inf),
        tail_BS=_spread(held_BS, kept.tail_logprob_N, torch.nan),
        nll_BS=_spread(held_BS, kept.nll_N, 0.0),
    )


def _spread(held_BS: Tensor, values_MX: Tensor, filler: float) -> NDArray[Any]:
    """Values of the held positions at their places, ``filler`` elsewhere: ``[B, S, ...]``."""
    spread = torch.full((*held_BS.shape, *values_MX.shape[1:]), filler, dtype=values_MX.dtype)
    spread[held_BS] = values_MX.cpu()
    array: NDArray[Any] = spread.numpy()
    return array
