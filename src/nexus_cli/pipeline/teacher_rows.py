"""Ask a model about packed sequences, and lay the answer out as rows of a teacher store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.topk import TopK, top_k
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.core.router.batching import to_device
from nexus_cli.errors import ArtifactError
from nexus_cli.io.teacher_store.rows import Kept, StoreRows

# Shape letters in this file: B sequences, S positions, H hidden size, L layers, N = B * S,
# E experts, A experts a token and layer, M positions whose next token is a target.


@dataclass(frozen=True)
class Question:
    """What is kept of an answer.

    Attributes:
        top_k: most entries a position.
        top_p: mass that the kept entries make up; 1 keeps ``top_k`` always.
        min_k: fewest entries a position.
        tail_samples: tokens drawn from the rest.
        experts: keep the chosen experts too.
    """

    top_k: int
    top_p: float = 1.0
    min_k: int = 1
    tail_samples: int = 0
    experts: bool = False


@dataclass(frozen=True)
class Answer:
    """What a model says of a batch; on its way to the host, if a GPU was asked.

    Attributes:
        batch: what it was asked about.
        kept: of the positions ``M``, on the host; ids are int32. To be read after :meth:`wait`.
        experts_MLA: uint8, likewise; ``None`` if not asked for.
        there: the copy to the host has ended; ``None`` if nothing is copied.
    """

    batch: Batch
    kept: TopK
    experts_MLA: Tensor | None
    there: torch.cuda.Event | None

    def wait(self) -> None:
        """Until the answer is on the host."""
        if self.there is not None:
            self.there.synchronize()

    def rows(self) -> StoreRows:
        """Lay the answer out, after :meth:`wait`, with numpy alone.

        torch would start threads of its own for a thread that writes, and those take the CPU
        from the model.

        Raises:
            ArtifactError: the model gives no numbers.
        """
        kept, batch, drawn = self.kept, self.batch, self.kept.tail_samples_Nm
        if not np.isfinite(kept.nll_N.numpy()).all():
            raise ArtifactError("the teacher gives probabilities that are not numbers")
        return StoreRows(
            input_ids_BS=batch.input_ids_BS.numpy().astype(np.int32),
            position_ids_BS=batch.position_ids_BS.numpy().astype(np.int32),
            loss_mask_BS=batch.loss_mask_BS.numpy(),
            source_B=batch.source_B.numpy().astype(np.int16),
            kept=Kept(
                ids_MK=kept.ids_NK.numpy(),
                logprobs_MK=kept.logprobs_NK.numpy(),
                tails_MT=kept.tails_NT.numpy(),
                nll_M=kept.nll_N.numpy(),
                tail_samples_MD=None if drawn is None else drawn.numpy(),
                experts_MLA=None if self.experts_MLA is None else self.experts_MLA.numpy(),
            ),
        )


def ask(
    model: NexusGptOssForCausalLM, batch: Batch, question: Question, *, seed: int = 0
) -> Answer:
    """Ask ``model`` about ``batch``, at the positions whose next token is a target.

    A GPU is given the work and not waited for: ask about the next batch before reading the rows.

    Args:
        model: the teacher, on any device; it runs as it is, with the shared experts it has.
        batch: sequences, on the CPU.
        question: what is kept.
        seed: of the samples of the tail.
    """
    head_VH = model.lm_head.weight
    device = head_VH.device
    labels_M = batch.input_ids_BS[:, 1:][batch.loss_mask_BS[:, 1:]]
    held_BS = torch.zeros_like(batch.loss_mask_BS)
    held_BS[:, :-1] = batch.loss_mask_BS[:, 1:]
    # Found on the host: a mask on the device is waited for.
    place_M = to_device(held_BS.flatten().nonzero()[:, 0], device)
    with torch.inference_mode():
        out = model.model(
            input_ids=to_device(batch.input_ids_BS, device),
            position_ids=to_device(batch.position_ids_BS, device),
            use_cache=False,
            output_router_logits=question.experts,
        )
        kept = top_k(
            out.last_hidden_state.flatten(0, 1).index_select(0, place_M),
            head_VH,
            to_device(labels_M, device),
            question.top_k,
            top_p=question.top_p,
            min_k=question.min_k,
            num_tail_samples=question.tail_samples,
            generator=torch.Generator(device).manual_seed(seed) if question.tail_samples else None,
        )
        experts_MLA = None
        if question.experts:
            experts_MLA = chosen(out.router_logits, place_M, model.config.num_experts_per_tok)
        return _on_host(batch, kept, experts_MLA)


def chosen(router_logits: Sequence[Tensor], place_M: Tensor, experts_a_token: int) -> Tensor:
    """The experts that every layer chose, ascending: ``[M, L, A]``, uint8.

    Args:
        router_logits: of every layer ``[N, E]``, at most 256 experts.
        place_M: positions to keep.
        experts_a_token: ``A``.
    """
    layers = [
        logits_NE.index_select(0, place_M).topk(experts_a_token, dim=-1).indices.sort().values
        for logits_NE in router_logits
    ]
    return torch.stack(layers, dim=1).to(torch.uint8)


def _on_host(batch: Batch, kept: TopK, experts_MLA: Tensor | None) -> Answer:
    """Start the copies; from a GPU they go to pinned memory, and the event says when they end."""
    drawn = kept.tail_samples_Nm
    copies = TopK(
        _copy(kept.ids_NK.to(torch.int32)),
        _copy(kept.logprobs_NK),
        _copy(kept.tails_NT),
        _copy(kept.nll_N),
        None if drawn is None else _copy(drawn.to(torch.int32)),
    )
    experts_MLA = None if experts_MLA is None else _copy(experts_MLA)
    there = None
    if kept.nll_N.is_cuda:
        there = torch.cuda.current_stream(kept.nll_N.device).record_event()
    return Answer(batch, copies, experts_MLA, there)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", non_blocking=True)
