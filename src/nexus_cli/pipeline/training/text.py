"""What a run reads: the sequences of its steps, and held-out text to judge by."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.data.blocks import PackedBlocks, batches, collate
from nexus_cli.core.data.order import mixture_order, shard
from nexus_cli.core.distill.store_teacher import Store, stored_batch
from nexus_cli.core.distributed import World
from nexus_cli.core.train.evaluation import HeldOut
from nexus_cli.core.train.feed import Blocks, StepBatches
from nexus_cli.errors import ResourceError
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.text import load_blocks
from nexus_cli.pipeline.training.request import Request, held_out_of

# Shape letters in this file: N samples of the whole run, B sequences of a batch.

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSequences:
    """Packed text behind the interface that the feed reads."""

    packed: PackedBlocks

    def __len__(self) -> int:
        return len(self.packed)

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        """The sequences ``index_B``."""
        return collate(self.packed, index_B)


@dataclass(frozen=True)
class StoredSequences:
    """The text that a teacher store holds, behind the same interface."""

    store: Store
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        """The sequences ``index_B``."""
        return stored_batch(self.store, index_B)


def training_batches(
    request: Request, workspace: Workspace, world: World
) -> tuple[StepBatches, str]:
    """The micro-batches of every step on this rank, and the digest of the text."""
    num_samples = request.max_steps * request.sequences_per_step
    data = request.config.data
    blocks: Blocks
    if request.store is not None:
        blocks = StoredSequences(request.store, len(request.store))
        shuffle = request.config.teacher.shuffle
        order_N = passes(len(request.store), num_samples, data.seed, shuffle=shuffle)
        digest = request.store.manifest.digest
    else:
        text = load_blocks(
            data,
            request.student.path,
            default_split="train",
            num_blocks=num_samples,
            cache_dir=workspace.root / "cache" / "text",
            num_processes=request.config.runtime.num_processes,
            world=world,
        )
        blocks, digest = TextSequences(text.blocks), text.digest
        order_N = mixture_order(
            data.seed,
            text.blocks.blocks_per_source,
            [source.weight for source in data.sources],
            num_samples,
        )
    steps = StepBatches(
        blocks,
        order_N,
        request.batch_size,
        request.config.gradient_accumulation_steps,
        world.rank,
        world.size,
    )
    return steps, digest


def passes(
    num_rows: int, num_samples: int, seed: int, *, shuffle: bool = False
) -> NDArray[np.int64]:
    """Rows of a store: a fresh permutation for every pass, a function of seed and pass alone.

    The first pass is in the order stored unless ``shuffle``: that is the order in which training
    would have read the text, so one pass offline reads what an online run would.
    """
    generator = np.random.default_rng([seed, num_rows])
    order = [] if shuffle else [np.arange(num_rows, dtype=np.int64)]
    while len(order) * num_rows < num_samples:
        order.append(generator.permutation(num_rows).astype(np.int64))
    return np.concatenate(order)[:num_samples]


def held_out_text(request: Request, workspace: Workspace, world: World) -> HeldOut | None:
    """This rank's part of the held-out text; ``None`` where there is none to read.

    An offline run has its text in the store, all of it to learn from, so it is judged only on
    text that the user names.
    """
    settings = request.config.evaluation
    data = settings.data or (held_out_of(request.config.data) if request.store is None else None)
    if settings.every is None:
        return None
    if data is None:
        log.info("no held-out text to judge by: name some with --set evaluation.data.sources=...")
        return None
    text = load_blocks(
        data,
        request.student.path,
        default_split="held-out",
        num_blocks=settings.sequences,
        cache_dir=workspace.root / "cache" / "text",
        num_processes=request.config.runtime.num_processes,
        world=world,
    )
    if len(text.blocks) == 0:
        raise ResourceError(
            "there is no held-out text", hint="raise data.held_out, or set evaluation.every to null"
        )
    per_batch = request.config.runtime.batch_size
    mine_N = shard(np.arange(len(text.blocks)), world.rank, world.size, per_batch)
    return HeldOut(
        [source.name for source in data.sources],
        list(batches(text.blocks, mine_N, per_batch)),
        request.config.runtime.head_chunk,
    )
