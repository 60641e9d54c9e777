"""What a teacher says about a batch, and the protocol that all three teachers follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nexus_cli.core.kernels.head_top_k import TAIL_TEMPERATURES as TAIL_TEMPERATURES

if TYPE_CHECKING:  # the name only: the maths does not load the data layer
    from nexus_cli.core.data.batch import Batch

# Shape letters in this file: N positions (batch and sequence flattened; position t predicts
# token t + 1), H hidden size, K teacher entries kept for each position,
# T temperatures of the tails.


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
    """The teacher's likeliest tokens at temperature 1, and the rest of the mass in one bucket.

    The bucket at another temperature does not follow from the one at 1, so it is kept at three.

    Attributes:
        ids_NK: vocabulary ids ``[N, K]``, int64, distinct within a row where used.
        logprobs_NK: their natural log-probabilities ``[N, K]``, float32; ``-inf`` marks an entry
            that is not used.
        tails_NT: ``log sum p ** (1 / T)`` over all tokens outside the used entries, one column for
            each of ``TAIL_TEMPERATURES`` ``[N, 3]``, float32; ``-inf`` if there are none.
            A position without a distribution uses no entry and has NaN here.
        dense: no position has a tail, as the entries are the whole vocabulary.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tails_NT: Tensor
    dense: bool = False

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The distribution over the entries and the bucket, with all logits divided by T.

        Args:
            temperature: one of ``TAIL_TEMPERATURES``; any above 0 if ``dense``.

        Returns:
            Log-probabilities of the entries ``[N, K]``, ``-inf`` where unused, and of the bucket
            ``[N]``, NaN where there is no distribution. The probabilities of a row sum to one.

        Raises:
            ValueError: the tail at this temperature is not known.
        """
        scaled_NK = self.logprobs_NK / temperature
        tail_N = self.tails_NT[:, self._column(temperature)]
        log_sum_N = torch.logaddexp(scaled_NK.logsumexp(-1), tail_N)
        logprobs_NK = scaled_NK - log_sum_N[:, None]
        unused_NK = self.logprobs_NK == -torch.inf  # still marked where the sum is NaN
        return logprobs_NK.masked_fill(unused_NK, -torch.inf), tail_N - log_sum_N

    def _column(self, temperature: float) -> int:
        if self.dense:
            return 0  # as good as any: nothing is left at any temperature
        if temperature not in TAIL_TEMPERATURES:
            known = ", ".join(map(str, TAIL_TEMPERATURES))
            raise ValueError(
                f"the tail of a top-K teacher is known at the temperatures {known}, "
                f"not at {temperature:g}"
            )
        return TAIL_TEMPERATURES.index(int(temperature))


TeacherSignal = DenseSignal | TopKSignal


class Teacher(Protocol):
    """Anything that can say what the original model thinks of a batch."""

    def signal(self, batch: Batch) -> TeacherSignal:
        """The teacher's view of every position of ``batch``, on the batch's device."""
        ...
