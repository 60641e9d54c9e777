"""One micro-batch: forward, the objective, and the sums that the metrics are made of.

The objective (each term a sum over counted tokens, divided by the count over *all*
micro-batches and ranks of the optimizer step, so that no split of a step changes it):

    loss = w_ce CE + w_kd T^2 D(teacher, student) + w_router T_r^2 KL(router_t || router_s)
         + w_lb load balance + w_z router z

with D ``KL(teacher || student)``, or the reverse KL or the JSD if asked, and ``w_ce, w_kd,
w_router`` given by the source that a token comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distill.divergence import DivergenceKind
from nexus_cli.core.distill.head import HeadLoss, head_loss
from nexus_cli.core.distill.losses import load_balance, router_drift, router_kl, router_z
from nexus_cli.core.distill.teacher import DenseSignal, TeacherSignal

# Shape letters in this file: B sequences, S tokens a sequence, N = B * S positions (position t
# predicts token t + 1), H hidden size, K data sources.


@dataclass(frozen=True)
class SourceWeights:
    """What the text of one source teaches."""

    ce: float
    kd: float
    router: float


@dataclass(frozen=True)
class Objective:
    """The parts of the objective that stay the same all through a run.

    Attributes:
        sources: weights of every data source, in the order of ``Batch.source_B``.
        load_balance: weight of the load-balance loss; 0 turns it off.
        router_z: weight of the router z-loss; 0 turns it off.
        router_temperature: ``T_r`` of the routers' KL.
        top_k: experts that a token is sent to.
        chunk_size: positions whose logits exist at one time.
        divergence: of teacher and student over the vocabulary; all but ``forward`` need a
            dense teacher.
        jsd_beta: beta of ``jsd``.
    """

    sources: Sequence[SourceWeights]
    load_balance: float = 0.0
    router_z: float = 0.0
    router_temperature: float = 1.0
    top_k: int = 4
    chunk_size: int = 256
    divergence: DivergenceKind = "forward"
    jsd_beta: float = 0.5

    @property
    def teaches_router(self) -> bool:
        """Whether the teacher's router logits are needed."""
        return any(source.router > 0 for source in self.sources)

    @property
    def sees_router(self) -> bool:
        """Whether the student's router logits are part of the loss."""
        return self.teaches_router or self.load_balance > 0 or self.router_z > 0


@dataclass(frozen=True)
class StepScale:
    """What a micro-batch must know of the optimizer step that it is a part of.

    Attributes:
        tokens: counted tokens of all micro-batches and ranks.
        sequences: sequences with a counted token, of all micro-batches and ranks.
        temperature: ``T`` of the vocabulary KL.
        kd_scale: the schedule's factor on every source's ``w_kd``.
        watch: also measure what costs extra: how far routing has moved from the teacher's, the
            teacher's entropy, and how often both models' likeliest tokens agree.
    """

    tokens: int
    sequences: int
    temperature: float = 1.0
    kd_scale: float = 1.0
    watch: bool = False


@dataclass(frozen=True)
class StepOutput:
    """A micro-batch's share of the step.

    Attributes:
        loss: this micro-batch's summand of the step's loss, ``[]`` with its graph.
        sums: float64 sums without a graph; adding them over micro-batches and ranks gives the
            step's. ``loss`` is among them.
    """

    loss: Tensor
    sums: dict[str, Tensor]


def target_mask(batch: Batch) -> Tensor:
    """Whether position ``t`` predicts a counted token, bool ``[B, S]``."""
    mask_BS = torch.zeros_like(batch.loss_mask_BS)
    mask_BS[:, :-1] = batch.loss_mask_BS[:, 1:]
    return mask_BS


class DistillationStep(nn.Module):
    """Student forward and objective as one module, so that DDP can wrap both.

    Args:
        model: the student; ``model.model`` gives hidden states and ``model.lm_head`` the frozen
            head (see ``core.model.gpt_oss``).
        objective: weights and constants.
    """

    weights_K3: Tensor

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        table = [[s.ce, s.kd, s.router] for s in objective.sources]
        self.register_buffer("weights_K3", torch.tensor(table), persistent=False)

    def forward(self, batch: Batch, signal: TeacherSignal | None, scale: StepScale) -> StepOutput:
        """Compute this micro-batch's summand of the loss.

        Args:
            batch: on the student's device.
            signal: what the teacher says of it; ``None`` for cross entropy alone.
            scale: the step's global counts and scheduled values.

        Raises:
            ValueError: the objective needs router logits that the signal does not carry.
        """
        watches = scale.watch and isinstance(signal, DenseSignal) and signal.router_logits
        needs_router = self.objective.sees_router or bool(watches)
        out = self.model.model(
            input_ids=batch.input_ids_BS,
            position_ids=batch.position_ids_BS,
            use_cache=False,
            shared_experts=True,
            output_router_logits=needs_router,
        )
        mask_BS = target_mask(batch)
        weights_N3 = self._token_weights(batch, mask_BS, scale)
        head = self._head(out.last_hidden_state, batch, weights_N3, signal, scale)
        loss, sums = head.total, self._head_sums(head, batch, mask_BS, weights_N3)
        if needs_router:
            extra, more = self._router_terms(
                out.router_logits, signal, mask_BS, weights_N3[:, 2], scale
            )
            loss, sums = loss + extra, sums | more
        return StepOutput(loss, {"loss": loss.detach().double(), **sums})

    def _token_weights(self, batch: Batch, mask_BS: Tensor, scale: StepScale) -> Tensor:
        """Each position's ``w_ce, w_kd, w_router`` over the global count, float32 ``[N, 3]``."""
        scale_3 = self.weights_K3.new_tensor([1.0, scale.kd_scale, 1.0]) / max(scale.tokens, 1)
        weights_B3 = self.weights_K3[batch.source_B] * scale_3
        return (weights_B3[:, None, :] * mask_BS[:, :, None]).flatten(0, 1)

    def _head(
        self,
        hidden_BSH: Tensor,
        batch: Batch,
        weights_N3: Tensor,
        signal: TeacherSignal | None,
        scale: StepScale,
    ) -> HeadLoss:
        labels_BS = batch.input_ids_BS.roll(-1, dims=1)  # the last one is never counted
        return head_loss(
            hidden_BSH.flatten(0, 1),
            self.model.lm_head.weight,
            labels_BS.flatten(),
            weights_N3[:, 0].contiguous(),
            weights_N3[:, 1].contiguous(),
            signal,
            temperature=scale.temperature,
            chunk_size=self.objective.chunk_size,
            metrics=scale.watch,
            divergence=self.objective.divergence,
            jsd_beta=self.objective.jsd_beta,
        )

    def _head_sums(
        self, head: HeadLoss, batch: Batch, mask_BS: Tensor, weights_N3: Tensor
    ) -> dict[str, Tensor]:
        """Sums by source, and over how many positions the head measured each."""
        num_sources, (_, length) = len(self.objective.sources), mask_BS.shape
        source_N = batch.source_B.repeat_interleave(length)

        def by_source(value_N: Tensor) -> Tensor:
            total_K = torch.zeros(num_sources, dtype=torch.float64, device=value_N.device)
            return total_K.index_add_(0, source_N, value_N.double())

        teaches_N2 = weights_N3[:, :2] != 0
        sums = {
            "tokens_K": by_source(mask_BS.flatten()),
            "ce_count_K": by_source(teaches_N2.any(dim=1)),
            "kd_count_K": by_source(teaches_N2[:, 1]),
            "ce_K": by_source(head.ce_N),
            "kd_K": by_source(head.kd_N),
        }
        if head.agreement_N is not None and head.entropy_N is not None:
            sums["agreement"] = head.agreement_N.double().sum()
            sums["teacher_entropy"] = head.entropy_N.double().sum()
        return sums

    def _router_terms(
        self,
        logits: tuple[Tensor, ...],
        signal: TeacherSignal | None,
        mask_BS: Tensor,
        weight_N: Tensor,
        scale: StepScale,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The routers' part of the loss, and what is measured of them."""
        objective, mask_N = self.objective, mask_BS.flatten()
        total, sums = weight_N.new_zeros(()), {}
        teacher = signal.router_logits if isinstance(signal, DenseSignal) else None
        if objective.teaches_router:
            if teacher is None:
                raise ValueError("router KL needs a teacher that gives its router logits")
            kl_N = router_kl(logits, teacher, temperature=objective.router_temperature)
            total = total + (weight_N * kl_N).sum()
            sums["router_kl"] = (kl_N.detach().double() * (weight_N != 0)).sum()
            sums["router_kl_count"] = (weight_N != 0).sum().double()
        if objective.load_balance > 0:
            balance, _ = load_balance(logits, mask_BS, top_k=objective.top_k)
            value = balance / max(scale.sequences, 1)
            total = total + objective.load_balance * value
            sums["load_balance"] = value.detach().double()
        if objective.router_z > 0:
            value = (router_z(logits) * mask_N).sum() / max(scale.tokens, 1)
            total = total + objective.router_z * value
            sums["router_z"] = value.detach().double()
        if scale.watch and teacher is not None:
            sums["drift"] = router_drift(logits, teacher, mask_N, top_k=objective.top_k).sums
        return total, sums
