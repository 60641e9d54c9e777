import numpy as np
import pytest
import torch

from nexus_cli.core.data.blocks import PackedBlocks, batches, collate


@pytest.fixture
def blocks():
    ids = np.arange(40, dtype=np.int32).reshape(10, 4)
    return PackedBlocks(
        input_ids_NS=ids,
        position_ids_NS=ids % 4,
        loss_mask_NS=ids % 3 == 0,
        source_N=np.repeat(np.array([0, 2], np.int16), 5),
        num_sources=3,
    )


def test_a_batch_holds_the_blocks_asked_for_in_their_order(blocks):
    batch = collate(blocks, np.array([7, 0, 3]))
    assert batch.input_ids_BS.tolist() == blocks.input_ids_NS[[7, 0, 3]].tolist()
    assert batch.loss_mask_BS.tolist() == blocks.loss_mask_NS[[7, 0, 3]].tolist()
    assert batch.source_B.tolist() == [2, 0, 0]
    assert batch.index_B.tolist() == [7, 0, 3]
    assert batch.input_ids_BS.dtype == batch.position_ids_BS.dtype == torch.int64
    assert batch.loss_mask_BS.dtype == torch.bool
    assert len(batch) == 3


def test_batches_cover_the_order_and_the_last_may_be_short(blocks):
    order = np.arange(10)[::-1]
    made = list(batches(blocks, order, 4))
    assert [len(batch) for batch in made] == [4, 4, 2]
    assert torch.cat([batch.index_B for batch in made]).tolist() == order.tolist()


def test_blocks_are_counted_by_source_even_where_there_are_none(blocks):
    assert blocks.blocks_per_source == [5, 0, 5]


def test_targets_are_counted_where_something_comes_before_them(blocks):
    batch = collate(blocks, np.arange(10))
    assert batch.num_targets == int(blocks.loss_mask_NS[:, 1:].sum())


def test_changing_a_batch_does_not_change_the_blocks(blocks):
    batch = collate(blocks, np.array([1]))
    batch.loss_mask_BS[:] = True
    batch.input_ids_BS[:] = 0
    assert blocks.input_ids_NS[1].tolist() == [4, 5, 6, 7]
    assert not blocks.loss_mask_NS[1].all()
