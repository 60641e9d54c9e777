"""What a teacher store will hold, settled before the teacher is asked."""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from numpy.typing import NDArray

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.core.data.blocks import PackedBlocks
from nexus_cli.core.data.order import mixture_order
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.io.hashing import sha256_bytes, sha256_file, sha256_json
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.teacher_store.id_planes import VocabularyRanks
from nexus_cli.io.teacher_store.manifest import StorePlan
from nexus_cli.io.teacher_store.writer import ranks_file
from nexus_cli.pipeline.inputs import Artifact
from nexus_cli.pipeline.text import TextBlocks

log = logging.getLogger(__name__)

ROWS_A_SHARD = 256
MIN_SHARDS = 16  # where there are as many batches: work for several ranks, little lost by a kill
_COUNTED = 1024  # sequences whose tokens are counted at a time


def order(config: PrecomputeConfig, blocks: PackedBlocks) -> NDArray[np.int64]:
    """The blocks to store, in mixture order, up to where the mixture would repeat one."""
    order_N = mixture_order(
        config.data.seed,
        blocks.blocks_per_source,
        [source.weight for source in config.data.sources],
        config.num_steps * config.batch_size,
    )
    _, first = np.unique(order_N, return_index=True)
    repeats_N = np.ones(len(order_N), dtype=np.bool_)
    repeats_N[first] = False
    if not repeats_N.any():
        return order_N
    end = int(repeats_N.argmax())
    source = config.data.sources[int(blocks.source_N[order_N[end]])]
    log.warning("%s has no more text after %d sequences of the mixture", source.name, end)
    return order_N[:end]


def vocabulary_ranks(
    blocks: PackedBlocks, order_N: NDArray[np.int64], vocab_size: int
) -> VocabularyRanks:
    """The vocabulary by its frequency in the text to be stored, before the teacher is asked.

    What the teacher expects is spread much like what is there; and the table is the same
    whoever writes.
    """
    count_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(order_N), _COUNTED):
        part_BS = blocks.input_ids_NS[order_N[start : start + _COUNTED]]
        count_V += np.bincount(part_BS.reshape(-1), minlength=vocab_size)
    return VocabularyRanks.by_count(count_V)


def store_plan(
    config: PrecomputeConfig,
    teacher: Artifact,
    shape: ModelShape,
    text: TextBlocks,
    order_N: NDArray[np.int64],
    ranks: VocabularyRanks,
    device: torch.device,
) -> StorePlan:
    """What decides the rows; the number of ranks does not."""
    batches_a_shard = min(
        max(1, ROWS_A_SHARD // config.batch_size), math.ceil(config.num_steps / MIN_SHARDS)
    )
    template = teacher.path / "chat_template.jinja"
    return StorePlan(
        teacher=teacher.digest,
        teacher_name=config.model,
        tokenizer=sha256_file(teacher.path / "tokenizer.json"),
        chat_template=sha256_file(template) if template.is_file() else None,
        data=config.data.model_dump(mode="json"),
        data_digest=sha256_json([text.digest, order_N.tolist()]),
        sources=tuple(source.name for source in config.data.sources),
        vocab_size=shape.vocab_size,
        vocab_ranks=sha256_bytes(ranks_file(ranks)),
        top_k=config.top_k,
        top_p=config.top_p,
        min_k=min(config.min_k, config.top_k),
        values=config.values,
        tail_samples=config.tail_samples,
        experts=(shape.num_layers, shape.top_k) if config.experts else (0, 0),
        dtype=str(frozen_dtype(config.dtype, device)).removeprefix("torch."),
        compression=config.compression,
        seq_len=config.data.seq_len,
        batch_size=config.batch_size,
        requested_steps=config.num_steps,
        num_rows=len(order_N),
        rows_per_shard=batches_a_shard * config.batch_size,
    )
