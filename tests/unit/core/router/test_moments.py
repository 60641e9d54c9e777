import numpy as np
import pytest
import torch

from nexus_cli.core.router import accumulate as accumulation
from nexus_cli.core.router.accumulate import MomentAccumulator
from nexus_cli.core.router.moments import Reservoir, RouterMoments, token_keys

LAYERS, EXPERTS, TOP_K = 3, 6, 2
CPU = torch.device("cpu")
SUMS = ("tokens", "probability_LE", "outer_LEE", "top1_LE", "topk_LE", "weight_LE")


def logits(seed, rows=40):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, EXPERTS, generator=generator) for _ in range(LAYERS)]


def zeros(reservoir=8):
    return RouterMoments.zeros(LAYERS, EXPERTS, TOP_K, reservoir)


def accumulate(batches, start=None):
    """``batches``: (document offset, logits); every row is a body token of its own document."""
    accumulator = MomentAccumulator(start or zeros(), CPU)
    for offset, layers in batches:
        rows = len(layers[0])
        keys = token_keys(offset + np.arange(rows), np.ones(rows, np.int64), seed=0)
        accumulator.add(layers, torch.arange(rows), torch.empty(0, dtype=torch.int64), keys)
    return accumulator.moments()


def assert_same(left, right, *, rtol=1e-12):
    for population in ("body", "first"):
        for name in SUMS:
            a, b = (getattr(getattr(m, population), name) for m in (left, right))
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-15)
    np.testing.assert_array_equal(left.reservoir.keys_R, right.reservoir.keys_R)
    np.testing.assert_array_equal(left.reservoir.probability_RLE, right.reservoir.probability_RLE)


def test_sums_are_those_of_a_loop_over_tokens():
    layers = logits(0)
    found = accumulate([(0, layers)]).body
    for layer, rows in enumerate(layers):
        total, outer = np.zeros(EXPERTS), np.zeros((EXPERTS, EXPERTS))
        top1, topk, weight = np.zeros(EXPERTS), np.zeros(EXPERTS), np.zeros(EXPERTS)
        for row in rows.double().numpy():
            p = np.exp(row) / np.exp(row).sum()
            total, outer = total + p, outer + np.outer(p, p)
            best = np.argsort(-row)[:TOP_K]
            top1[best[0]] += 1
            topk[best] += 1
            weight[best] += p[best] / p[best].sum()  # softmax over the top k is renormalisation
        np.testing.assert_allclose(found.probability_LE[layer], total, rtol=1e-12)
        np.testing.assert_allclose(found.outer_LEE[layer], outer, rtol=1e-12)
        np.testing.assert_array_equal(found.top1_LE[layer], top1)
        np.testing.assert_array_equal(found.topk_LE[layer], topk)
        np.testing.assert_allclose(found.weight_LE[layer], weight, rtol=1e-12)


def test_the_covariance_is_numpys():
    layers = logits(1)
    found = accumulate([(0, layers)]).body.covariance()
    for layer, rows in enumerate(layers):
        np.testing.assert_allclose(
            found[layer], np.cov(rows.double().softmax(-1).T.numpy()), rtol=1e-10, atol=1e-16
        )


def test_the_covariance_of_rare_experts_survives_a_million_tokens():
    # Cancellation: the mean square is 1e4 times the variance of an expert with p near 1e-9.
    rows = torch.zeros(1000, EXPERTS, dtype=torch.float64)
    rows[:, 0] = -20 + 0.01 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    once = accumulate([(0, [rows] * LAYERS)]).body
    many = RouterMoments(TOP_K, once, once, Reservoir.empty(0, LAYERS, EXPERTS))
    for _ in range(10):
        many = many + many
    expected = np.cov(np.tile(rows.softmax(-1).T.numpy(), 1024), bias=True)
    np.testing.assert_allclose(many.body.covariance()[0, 0, 0], expected[0, 0], rtol=1e-5)


def test_usage_sums_to_one_and_counts_to_the_tokens():
    body = accumulate([(0, logits(2))]).body
    np.testing.assert_allclose(body.usage().sum(axis=1), 1.0)
    np.testing.assert_array_equal(body.top1_LE.sum(axis=1), 40)
    np.testing.assert_array_equal(body.topk_LE.sum(axis=1), 40 * TOP_K)


def test_any_split_over_ranks_gives_the_same_statistics():
    batches = [(100 * i, logits(i)) for i in range(6)]
    whole = accumulate(batches)
    for size in (2, 3, 4):
        parts = [accumulate(batches[rank::size]) for rank in range(size)]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged + part
        assert_same(merged, whole)


def test_continuing_from_a_checkpoint_is_the_unbroken_run_bit_for_bit():
    batches = [(100 * i, logits(i)) for i in range(4)]
    whole = accumulate(batches)
    resumed = accumulate(batches[2:], start=accumulate(batches[:2]))
    for name in SUMS:
        np.testing.assert_array_equal(getattr(resumed.body, name), getattr(whole.body, name))
    assert_same(resumed, whole, rtol=0)


def test_rows_that_are_not_listed_are_not_counted():
    layers = logits(3)
    for rows in layers:
        rows[10:] = float("nan")  # padding may hold anything
    accumulator = MomentAccumulator(zeros(), CPU)
    keys = token_keys(np.zeros(8, np.int64), np.arange(1, 9), seed=0)
    accumulator.add(layers, torch.arange(1, 9), torch.tensor([0, 9]), keys)
    found = accumulator.moments()
    assert (found.body.tokens, found.first.tokens) == (8, 2)
    expected = layers[0][[0, 9]].double().softmax(-1).sum(0)
    np.testing.assert_allclose(found.first.probability_LE[0], expected)


def test_the_reservoir_holds_whole_tokens_with_the_smallest_keys():
    batches = [(100 * i, logits(i)) for i in range(5)]
    found = accumulate(batches).reservoir
    documents = np.concatenate([offset + np.arange(40) for offset, _ in batches])
    keys = token_keys(documents, np.ones(200, np.int64), seed=0)
    stacked = torch.cat([torch.stack(layers, 1) for _, layers in batches])
    kept = np.argsort(keys)[:8]
    np.testing.assert_array_equal(found.keys_R, keys[kept])
    expected = stacked[torch.from_numpy(kept)].double().softmax(-1).half()
    np.testing.assert_array_equal(found.probability_RLE, expected.numpy())


def test_samples_that_are_fetched_early_or_late_are_the_same(monkeypatch):
    batches = [(100 * i, logits(i)) for i in range(7)]
    late = accumulate(batches)
    monkeypatch.setattr(accumulation, "WAITING_BYTES", 0)
    early = accumulate(batches)
    assert_same(early, late, rtol=0)
    # Also where the sample is read in between, and goes on.
    accumulator = MomentAccumulator(zeros(), CPU)
    for offset, layers in batches:
        keys = token_keys(offset + np.arange(40), np.ones(40, np.int64), seed=0)
        accumulator.add(layers, torch.arange(40), torch.empty(0, dtype=torch.int64), keys)
        accumulator.moments()
    assert_same(accumulator.moments(), late, rtol=0)


def test_a_sample_of_no_token_and_a_pass_of_no_token():
    empty = torch.empty(0, dtype=torch.int64)
    accumulator = MomentAccumulator(zeros(reservoir=0), CPU)
    accumulator.add(logits(0), empty, torch.arange(40), np.empty(0, np.uint64))
    found = accumulator.moments()
    assert (found.body.tokens, found.first.tokens) == (0, 40)
    assert found.reservoir.probability_RLE.shape == (0, LAYERS, EXPERTS)
    np.testing.assert_array_equal(found.first.top1_LE.sum(axis=1), 40)
    assert not found.body.topk_LE.any()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_may_be_worked_on_one_by_one_or_together(layers, monkeypatch):
    monkeypatch.setattr(accumulation, "GROUP_NUMBERS_CPU", 10**9)
    together = accumulate([(0, logits(0))])
    monkeypatch.setattr(accumulation, "GROUP_NUMBERS_CPU", layers * 40 * EXPERTS)
    assert_same(accumulate([(0, logits(0))]), together)


def test_experts_are_counted_whose_weight_is_too_small_for_a_number():
    rows = torch.zeros(5, EXPERTS)
    rows[:, 0] = 1e6  # the second expert's weight underflows to 0; it is chosen all the same
    found = accumulate([(0, [rows] * LAYERS)]).body
    np.testing.assert_array_equal(found.topk_LE.sum(axis=1), 5 * TOP_K)
    np.testing.assert_array_equal(found.top1_LE[:, 0], 5)
    np.testing.assert_array_equal(found.weight_LE[:, 0], 5.0)


def test_keys_are_distinct_seeded_and_uniform():
    documents, positions = np.divmod(np.arange(100_000), 500)
    keys = token_keys(documents, positions, seed=0)
    assert len(np.unique(keys)) == len(keys)
    assert (keys != token_keys(documents, positions, seed=1)).all()
    histogram = np.bincount((keys >> np.uint64(60)).astype(int), minlength=16)
    assert np.abs(histogram - 6250).max() < 5 * np.sqrt(6250)


def test_bfloat16_logits_are_lifted_before_the_softmax():
    layers = [rows.bfloat16() for rows in logits(4)]
    found = accumulate([(0, layers)]).body
    np.testing.assert_allclose(found.probability_LE.sum(axis=1), 40, rtol=1e-13)


def test_a_router_that_produces_nan_is_named():
    layers = logits(5)
    layers[2][3, 1] = float("nan")
    with pytest.raises(ValueError, match="layer 2 produced NaN"):
        accumulate([(0, layers)])


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="not \\(3, 6\\)"):
        accumulate([(0, logits(0)[:2])])
    with pytest.raises(ValueError, match="different shapes"):
        zeros() + RouterMoments.zeros(LAYERS, EXPERTS + 1, TOP_K, 8)


def test_statistics_of_no_token_are_refused():
    with pytest.raises(ValueError, match="no token"):
        zeros().body.mean()
    with pytest.raises(ValueError, match="two tokens"):
        zeros().body.covariance()
