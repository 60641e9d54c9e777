"""What the ranks of a run exchange: gradients, token counts, and a wish to stop."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distributed import World
from nexus_cli.core.train.step import DistillationStep, target_mask


@dataclass(frozen=True)
class StepCounts:
    """What all ranks know before a step.

    Attributes:
        tokens: counted tokens of the step, over micro-batches and ranks.
        positions: positions that the student reads, counted in the loss or not.
        sequences: sequences with a counted token.
        stop_signal: number of a signal that some rank received, or 0.
    """

    tokens: int
    positions: int
    sequences: int
    stop_signal: int


def agree(batches: Sequence[Batch], received: int | None, world: World) -> StepCounts:
    """Count the coming step over all ranks and spread a stop signal, in one exchange.

    A signal may reach the ranks at different moments; only together can they stop, or some
    would wait for the others' gradients for ever.
    """
    masks = [target_mask(batch) for batch in batches]
    counts = [
        sum(int(mask_BS.sum()) for mask_BS in masks),
        sum(mask_BS.numel() for mask_BS in masks),
        sum(int(mask_BS.any(dim=1).sum()) for mask_BS in masks),
        int(received == signal.SIGTERM),
        int(received == signal.SIGINT),
    ]
    total = world.sum_(torch.tensor(counts, dtype=torch.int64, device=world.device))
    tokens, positions, sequences, terminated, interrupted = map(int, total.tolist())
    stop = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
    return StepCounts(tokens, positions, sequences, int(stop))


def wrap_for_ranks(step: DistillationStep, world: World) -> nn.Module:
    """DDP around ``step`` where there are several ranks.

    Frozen tensors and all buffers are on DDP's ignore list: every rank loaded the same files, and
    packed uint8 experts need no exchange. Gradients are summed, not averaged, since each rank's
    loss is already its summand of the global mean.
    """
    if world.size == 1:
        return step
    trains = {name for name, parameter in step.named_parameters() if parameter.requires_grad}
    names = [name for name, _ in (*step.named_parameters(), *step.named_buffers())]
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(step, [name for name in names if name not in trains])
    wrapped = DistributedDataParallel(step, gradient_as_bucket_view=True)
    # A lambda, because DDP compares the annotations of a hook with types, and ours are text.
    wrapped.register_comm_hook(None, lambda _, bucket: _sum_bucket(bucket))
    return wrapped


def _sum_bucket(bucket: Any) -> torch.futures.Future[Tensor]:
    work: Any = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed
