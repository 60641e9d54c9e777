"""What a step reads is a function of its number, whatever the split, the rank or the thread."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from nexus_cli.core.distill.teacher import DenseSignal
from nexus_cli.core.train.feed import Feed, StepBatches
from nexus_cli.core.train.ranks import agree
from nexus_cli.core.train.signals import StopRequest


class Echo:
    """A teacher whose signal is the indices that it was asked about."""

    def signal(self, batch):
        return DenseSignal(batch.index_B[:, None].float())


ORDER = np.random.default_rng(3).permutation(16)


def read(blocks, step, **split):
    """All sequences of ``step``, over all ranks of a split."""
    ranks = range(split.get("size", 1))
    parts = [StepBatches(blocks, ORDER, rank=rank, **split).micro_batches(step) for rank in ranks]
    return sorted(int(i) for part in parts for batch in part for i in batch.index_B)


@pytest.mark.parametrize(
    "split",
    [
        {"batch_size": 8, "accumulation": 1},
        {"batch_size": 2, "accumulation": 4},
        {"batch_size": 1, "accumulation": 4, "size": 2},
        {"batch_size": 2, "accumulation": 1, "size": 4},
    ],
)
def test_a_step_is_a_slice_of_the_order_however_it_is_split(blocks, split):
    assert read(blocks, 0, **split) == sorted(ORDER[:8])
    assert read(blocks, 1, **split) == sorted(ORDER[8:])


def test_a_step_beyond_the_order_is_refused(blocks):
    with pytest.raises(ValueError, match="step 2 of 2"):
        StepBatches(blocks, ORDER, 8, 1).micro_batches(2)


@pytest.mark.parametrize("ahead", [False, True])
def test_each_batch_comes_with_its_own_signal(blocks, ahead):
    batches = StepBatches(blocks, ORDER, 2, 2)
    with Feed(batches, Echo(), torch.device("cpu"), ahead=ahead) as feed:
        seen = []
        for step in range(batches.num_steps):
            for batch, told in feed.pairs(step):
                assert torch.equal(told.hidden_NH[:, 0], batch.index_B.float())
                seen += batch.index_B.tolist()
    assert seen == ORDER.tolist()


def test_an_error_of_the_teacher_ahead_reaches_the_loop(blocks):
    class Broken:
        def signal(self, _batch):
            raise ValueError("no signal")

    with (
        Feed(StepBatches(blocks, ORDER, 2, 2), Broken(), torch.device("cpu"), ahead=True) as feed,
        pytest.raises(ValueError, match="no signal"),
    ):
        list(feed.pairs(0))


def test_counts_are_of_targets_and_of_sequences_that_have_one(blocks, alone):
    batches = StepBatches(blocks, ORDER, 8, 1).micro_batches(0)
    batches[0].loss_mask_BS[0] = False
    batches[0].loss_mask_BS[1] = False
    batches[0].loss_mask_BS[1, 0] = True  # the first token of a row has nothing to predict it
    counts = agree(batches, None, alone)
    assert counts.tokens == sum(batch.num_targets for batch in batches)
    assert counts.sequences == 6
    assert counts.stop_signal == 0
    assert agree(batches, signal.SIGTERM, alone).stop_signal == signal.SIGTERM


def test_a_signal_is_remembered_and_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    with StopRequest() as stop:
        assert stop.received is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
