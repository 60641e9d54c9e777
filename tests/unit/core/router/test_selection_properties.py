"""What selection must do with any router: checked on many synthetic ones with planted structure."""

from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from nexus_cli.core.router.accumulate import MomentAccumulator
from nexus_cli.core.router.analysis import METHODS, analyse_layers
from nexus_cli.core.router.importance import pca_importance, principal_components
from nexus_cli.core.router.moments import RouterMoments, token_keys
from nexus_cli.core.router.selection import select_diverse

HIDDEN, TOKENS, TOP_K = 24, 2000, 2
SEEDS = range(6)
COPIES = {
    # relative noise of the copy's row, and what is added to its bias
    "the same": (0.0, 0.0),
    "rarer": (0.0, -2.0),  # its probability is a fixed share of the original's
    "commoner": (0.0, 1.0),
    "noisy": (1e-3, 0.0),
    "noisy and rarer": (1e-3, -1.0),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several would wait for each other longer than these small sums take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def router(seed, experts):
    """Rows and biases of a router that uses all experts, some far more than others."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(experts, HIDDEN)) * rng.uniform(0.2, 0.5, size=(experts, 1))
    return weight, 0.5 * rng.normal(size=experts)


def logits(weight, bias, seed, tokens=TOKENS):
    """What the router says of random inputs, in float32 as a model's is."""
    inputs = np.random.default_rng([seed, 1]).normal(size=(tokens, HIDDEN))
    return torch.from_numpy(inputs @ weight.T + bias).float()


def moments(rows, batches=(TOKENS,), ranks=1, top_k=TOP_K):
    """Statistics of one layer's logits, in batches that are dealt out to ranks."""
    parts = []
    starts = np.cumsum([0, *batches])[:-1]
    for rank in range(ranks):
        accumulator = MomentAccumulator(
            RouterMoments.zeros(1, rows.shape[1], top_k, 0), torch.device("cpu")
        )
        for start, size in list(zip(starts, batches, strict=True))[rank::ranks]:
            keys = token_keys(np.arange(start, start + size), np.ones(size, np.int64), seed=0)
            batch = rows[start : start + size]
            none = torch.empty(0, dtype=torch.int64)
            accumulator.add([batch], torch.arange(size), none, keys)
        parts.append(accumulator.moments())
    return reduce(add, parts)


def statistics(weight, bias, seed):
    """Covariance and usage of a layer that sends every token to all experts: none is unused."""
    body = moments(logits(weight, bias, seed), top_k=len(bias)).body
    return body.covariance()[0], body.usage()[0]


def analysed(sums, count=3, **settings):
    settings = {"method": "diverse", "num_components": 20, "family_distance": 0.7} | settings
    return analyse_layers(sums, count=count, **settings)[0]


def taken(layer, method):
    return layer.selections[method].experts_T.tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("experts", [6, 24])
def test_a_planted_copy_is_not_taken_beside_its_original_while_another_is_left(experts, kind, seed):
    noise, shift = COPIES[kind]
    rng = np.random.default_rng(seed)
    weight, bias = router(seed, experts)
    variance = np.diagonal(statistics(weight, bias, seed)[0])
    # the most tempting one, and any
    for original in {int(variance.argmax()), int(rng.integers(experts))}:
        row = weight[original] * (1 + noise * rng.normal(size=HIDDEN))
        copied = np.vstack([weight, row]), np.append(bias, bias[original] + shift)
        found = statistics(*copied, seed)
        for count in (2, experts // 2, experts - 1):  # the last of a layer follows from the others
            chosen = select_diverse(*found, count)
            assert not {original, experts} <= set(chosen.experts_T.tolist())
            assert chosen.independent == count


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale", [0.01, 3.0, -0.5])
def test_an_affine_copy_of_any_sign_is_a_copy(seed, scale):
    samples = logits(*router(seed, 9), seed).double().softmax(-1).numpy()
    original = int(samples.var(axis=0).argmax())
    samples = np.column_stack([samples, 0.3 + scale * samples[:, original]])
    chosen = select_diverse(np.cov(samples.T), samples.mean(axis=0), 8)
    assert not {original, 9} <= set(chosen.experts_T.tolist())
    assert chosen.independent == 8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("scale", "both"), [(0.5, False), (-0.5, True)])
def test_a_noisy_copy_is_one_only_if_it_rises_with_its_original(seed, scale, both):
    samples = logits(*router(seed, 8), seed).double().softmax(-1).numpy()
    original = int(samples.var(axis=0).argmax())
    noise = 0.01 * samples[:, original].std() * np.random.default_rng(seed).normal(size=TOKENS)
    samples = np.column_stack([samples, 0.6 + scale * (samples[:, original] + noise)])
    chosen = select_diverse(np.cov(samples.T), samples.mean(axis=0), 9)
    assert ({original, 8} <= set(chosen.experts_T[: chosen.independent].tolist())) == both


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("steepness", [8, 32])
def test_two_experts_that_share_nearly_all_tokens_are_both_taken(steepness, seed):
    weight, bias = router(seed, 32)
    weight, bias = 0.3 * weight, 0 * bias
    direction = np.random.default_rng([seed, 2]).normal(size=HIDDEN)
    weight[0] = steepness * direction / np.linalg.norm(direction)
    weight[1] = -weight[0]
    bias[:2] = 6  # each is about one minus the other
    covariance, usage = statistics(weight, bias, seed)
    assert usage[:2].min() > 0.4
    assert {0, 1} <= set(select_diverse(covariance, usage, 24).experts_T.tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rare_expert_comes_before_a_noisy_copy_of_the_commonest(seed):
    weight, bias = router(seed, 8)
    weight[0], bias[0] = 4 * weight[0], bias[0] + 2
    bias[3] -= 6
    weight = np.vstack([weight, weight[0] * (1 + 2e-3)])
    covariance, usage = statistics(weight, np.append(bias, bias[0]), seed)
    assert usage[3] < usage[8] / 100
    chosen = select_diverse(covariance, usage, 7).experts_T.tolist()
    assert not {0, 8} <= set(chosen)


@pytest.mark.parametrize("seed", SEEDS)
def test_many_copies_of_one_expert_count_as_one(seed):
    weight, bias = router(seed, 6)
    weight, bias = np.vstack([weight, *[weight[2]] * 5]), np.append(bias, [bias[2]] * 5)
    covariance, usage = statistics(weight, bias, seed)
    chosen = select_diverse(covariance, usage, 11)
    assert chosen.independent == 5
    copies = {2, *range(6, 11)}
    assert len(copies & set(chosen.experts_T[:5].tolist())) <= 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("experts", "count"), [(4, 1), (8, 2), (32, 4), (128, 24)])
def test_a_planted_important_expert_is_always_taken_by_every_method(experts, count, seed):
    # It is used most, and moves on its own: its row has the others' part taken out.
    weight, bias = router(seed, experts)
    planted = int(np.random.default_rng(seed).integers(experts))
    own = np.random.default_rng([seed, 2]).normal(size=HIDDEN)
    weight[planted] = 4 * own / np.linalg.norm(own)
    bias[planted] = bias.max() + 2
    layer = analysed(moments(logits(weight, bias, seed)).body, count)
    for method in METHODS:
        assert planted in taken(layer, method)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [{"count": 5}, {"usage_share": 0.8}])
def test_experts_in_another_order_give_the_same_experts(size, method, seed):
    rows = logits(*router(seed, 16), seed)
    order = np.random.default_rng(seed).permutation(16)
    settings = {"method": method, **size}
    straight = analysed(moments(rows).body, **settings)
    shuffled = analysed(moments(rows[:, torch.from_numpy(order)]).body, **settings)
    assert order[taken(shuffled, method)].tolist() == taken(straight, method)


@pytest.mark.parametrize("experts", [2, 8, 32])
@pytest.mark.parametrize("seed", range(4))
def test_moments_of_batches_are_scikit_learns_pca_of_all_samples(experts, seed):
    rows = logits(*router(seed, experts), seed)
    samples = rows.double().softmax(-1).numpy()
    streamed = moments(rows, batches=(1, 700, 13, 286, 1000), ranks=3).body
    found = principal_components(streamed.covariance()[0])
    oracle = PCA(svd_solver="full").fit(samples)
    np.testing.assert_allclose(found.variance_E, oracle.explained_variance_, rtol=1e-7, atol=1e-14)
    meaningful = slice(0, experts - 1)  # the last component has no variance, so no direction
    overlap = (found.loading_EE * oracle.components_).sum(axis=1)[meaningful]
    np.testing.assert_allclose(np.abs(overlap), 1.0, rtol=1e-6)
    shares = oracle.explained_variance_ratio_[:, None] * np.abs(oracle.components_)
    expected = shares[: min(20, experts)].sum(axis=0)
    np.testing.assert_allclose(pca_importance(found, 20), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_ranks_gives_the_same_analysis(ranks, seed):
    rows = logits(*router(seed, 12), seed)
    batches = [100] * 8 + [300] * 4
    assert sum(batches) == TOKENS
    settings = {"count": 1, "usage_share": 0.7}
    alone = analysed(moments(rows, batches).body, **settings)
    merged = analysed(moments(rows, batches, ranks).body, **settings)
    for method in METHODS:
        assert taken(merged, method) == taken(alone, method)
    np.testing.assert_allclose(merged.importance_E, alone.importance_E, rtol=1e-9)
    np.testing.assert_allclose(merged.correlation_EE, alone.correlation_EE, atol=1e-10)
    assert merged.families.groups() == alone.families.groups()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_usage_takes_the_fewest_of_the_order_that_hold_it(method, seed):
    body = moments(logits(*router(seed, 16), seed)).body
    order = taken(analysed(body, 16, method=method), method)
    usage = body.usage()[0]
    for share in (0.05, 0.5, 0.8, 0.99, 1.0):
        fewest = next(n for n in range(1, 17) if usage[order[:n]].sum() >= share - 1e-9)
        layer = analysed(body, method=method, usage_share=share)
        assert taken(layer, method) == order[:fewest]
        assert layer.usage_fraction(method) >= share - 1e-9
        # what the methods explain is compared for equally many experts
        assert {len(taken(layer, other)) for other in METHODS} == {fewest}


@pytest.mark.parametrize("seed", SEEDS)
def test_fewer_experts_are_the_beginning_of_more(seed):
    found = statistics(*router(seed, 16), seed)
    everything = select_diverse(*found, 16)
    for count in range(1, 17):
        some, first = select_diverse(*found, count), everything.first(count)
        assert some.experts_T.tolist() == first.experts_T.tolist()
        np.testing.assert_array_equal(some.score_T, first.score_T)
        assert some.independent == first.independent
