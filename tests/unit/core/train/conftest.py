"""A student with open gates, packed sequences, and the pieces of a run on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nexus_cli.core.data.blocks import PackedBlocks, collate
from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.surgery import trainable_names
from nexus_cli.core.train.precision import promote

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class MemoryBlocks:
    """Packed sequences behind the interface that the feed reads."""

    packed: PackedBlocks

    def __len__(self):
        return len(self.packed)

    def batch(self, index_B):
        return collate(self.packed, index_B)


def packed_blocks(num_blocks=16, seq_len=24, vocab=500, num_sources=2, seed=0):
    generator = np.random.default_rng(seed)
    positions = np.tile(np.arange(seq_len), (num_blocks, 1))
    positions[:, seq_len // 2 :] -= seq_len // 2  # two documents a block
    mask = generator.random((num_blocks, seq_len)) < 0.7
    mask[positions == 0] = False
    return PackedBlocks(
        input_ids_NS=generator.integers(0, vocab, (num_blocks, seq_len), dtype=np.int32),
        position_ids_NS=positions.astype(np.int32),
        loss_mask_NS=mask,
        source_N=np.sort(np.arange(num_blocks) % num_sources).astype(np.int16),
        num_sources=num_sources,
    )


@pytest.fixture
def blocks():
    return MemoryBlocks(packed_blocks())


@pytest.fixture
def alone():
    return ALONE


@pytest.fixture
def make_student(tiny_converted_dir):
    """A fresh student with lively shared experts; ``gate`` is how far its gates are open."""

    def make(gate=0.5, train_router=False, dtype=torch.float32):
        model = load_model(tiny_converted_dir, device="cpu", dtype=dtype)
        masters = promote(model, trainable_names(model, train_router=train_router))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, master in masters.items():
                if name.endswith("output_gate"):
                    master.fill_(gate)
                elif ".shared_expert." in name:  # as large as the routed experts
                    master.normal_(0.0, 0.3, generator=generator)
        return model, masters

    return make
