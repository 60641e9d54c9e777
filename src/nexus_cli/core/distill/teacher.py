"""What a teacher says about a batch, and the protocol that all three teachers follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:  # the name only: the maths does not load the data layer
    from nexus_cli.core.data.batch import Batch

# Shape letters in this file: N positions (batch and sequence flattened; position t predicts
# token t + 1), H hidden size, K teacher entries kept for each position.


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's whole distribution, as the hidden states that the frozen head turns into it.

    Hidden states cost ``H`` numbers a position where logits cost the whole vocabulary, and the
    student holds the identical head already.

    Attributes:
        hidden_NH: final hidden states after the last norm ``[N, H]``, any float dtype, no graph.
        router_logits: raw router logits of every layer, each ``[N, E]``, or ``None`` if not asked
            for.
    """

    hidden_NH: Tensor
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's K likeliest tokens, and one bucket that holds the rest of the mass.

    Attributes:
        ids_NK: vocabulary ids ``[N, K]``, int64, distinct within a row where used.
        logprobs_NK: their natural log-probabilities ``[N, K]``, float32; ``-inf`` marks an entry
            that is not used.
        tail_logprob_N: log of the mass outside the K entries ``[N]``, float32; ``-inf`` if none.
        temperature: the temperature at which all of them were taken.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logprob_N: Tensor
    temperature: float = 1.0


TeacherSignal = DenseSignal | TopKSignal


class Teacher(Protocol):
    """Anything that can say what the original model thinks of a batch."""

    def signal(self, batch: Batch) -> TeacherSignal:
        """The teacher's view of every position of ``batch``, on the batch's device."""
        ...
