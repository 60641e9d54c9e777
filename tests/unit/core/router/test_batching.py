import numpy as np
import pytest

from nexus_cli.core.router.batching import (
    PAD_MULTIPLE,
    make_batch,
    padded_length,
    plan_batches,
)


def test_every_sequence_is_in_one_batch_and_the_longest_come_first():
    lengths = [5, 40, 7, 40, 1, 12, 33]
    batches = plan_batches(lengths, 3)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert [lengths[index] for batch in batches for index in batch] == sorted(lengths)[::-1]
    assert [len(batch) for batch in batches] == [3, 4]  # 3 x 64 tokens, and 4 of 6 x 32


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batches_of_short_sequences_hold_more_of_them_in_the_same_memory(batch_size):
    rng = np.random.default_rng(0)
    lengths = [512, *rng.integers(10, 513, 1000).tolist()]
    batches = plan_batches(lengths, batch_size)
    most = batch_size * 512
    assert len(batches[0]) == batch_size
    for place, batch in enumerate(batches):
        longest = padded_length(max(lengths[index] for index in batch))
        assert len(batch) * longest <= most
        if place < len(batches) - 1:
            assert (len(batch) + 1) * longest > most


def test_no_sequence_makes_no_batch():
    assert plan_batches([], 4) == []


def test_the_listed_rows_are_the_real_tokens():
    sequences = [np.array([7, 8, 9], np.int32), np.array([4, 5], np.int32)]
    batch = make_batch(sequences, [10, 11], pad_id=0, seed=0)
    assert batch.input_ids_BS.shape == (2, PAD_MULTIPLE)
    flat, places = batch.input_ids_BS.flatten(), batch.position_ids_BS.flatten()
    assert flat[batch.body_N].tolist() == [8, 9, 5]
    assert places[batch.body_N].tolist() == [1, 2, 1]
    assert flat[batch.first_B].tolist() == [7, 4]
    assert places[batch.first_B].tolist() == [0, 0]


def test_a_token_has_the_same_key_in_any_batch():
    sequences = [np.arange(n, dtype=np.int32) for n in (5, 70, 3)]
    together = make_batch(sequences, [0, 1, 2], pad_id=0, seed=9).keys_N
    apart = [make_batch([ids], [i], pad_id=0, seed=9).keys_N for i, ids in enumerate(sequences)]
    np.testing.assert_array_equal(together, np.concatenate(apart))
    assert len(np.unique(together)) == 4 + 69 + 2


@pytest.mark.parametrize("longest", [1, 31, 32, 33])
def test_lengths_are_padded_to_few_different_ones(longest):
    batch = make_batch([np.ones(longest, np.int32)], [0], pad_id=0, seed=0)
    assert batch.input_ids_BS.shape[1] == -(-longest // 32) * 32
