import numpy as np
import pytest
from sklearn.decomposition import PCA

from nexus_cli.core.router.families import correlation, expert_families
from nexus_cli.core.router.importance import pca_importance, principal_components
from nexus_cli.core.router.selection import explained_by, select_diverse, select_highest


def probabilities(seed, experts=12, tokens=3000, spread=None):
    """Softmax of correlated logits; ``spread`` scales each expert's logits."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(5, experts))
    logits = rng.normal(size=(tokens, 5)) @ mixing + 0.5 * rng.normal(size=(tokens, experts))
    logits *= 1.0 if spread is None else spread
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def with_copy(values, original):
    """A layer in which one expert has an exact twin, which takes half of its probability."""
    shared = values.copy()
    shared[:, original] /= 2
    return np.concatenate([shared, shared[:, [original]]], axis=1)


def usage_of(values):
    return values.mean(axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_components_are_those_of_scikit_learns_pca_on_the_samples(seed):
    samples = probabilities(seed)
    oracle = PCA(svd_solver="full").fit(samples)
    found = principal_components(np.cov(samples.T))
    np.testing.assert_allclose(found.variance_E, oracle.explained_variance_, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(
        found.variance_ratio(), oracle.explained_variance_ratio_, rtol=1e-9, atol=1e-12
    )
    meaningful = slice(0, 11)  # probabilities sum to one, so the last variance is zero
    overlap = (found.loading_EE * oracle.components_).sum(axis=1)
    np.testing.assert_allclose(np.abs(overlap[meaningful]), 1.0, rtol=1e-8)


@pytest.mark.parametrize("num_components", [1, 4, 12, 20])
def test_importance_is_the_formula_on_scikit_learns_components(num_components):
    samples = probabilities(0)
    oracle = PCA(n_components=min(num_components, 12), svd_solver="full").fit(samples)
    expected = np.zeros(12)
    for loading, ratio in zip(oracle.components_, oracle.explained_variance_ratio_, strict=True):
        expected += np.abs(loading) * ratio
    found = pca_importance(principal_components(np.cov(samples.T)), num_components)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_components_are_counted_up_to_a_share_of_the_variance():
    found = principal_components(np.diag([5.0, 3.0, 1.0, 1.0]))
    assert [found.needed_for(share) for share in (0.5, 0.8, 0.81, 1.0)] == [1, 2, 3, 4]


def test_a_layer_in_which_nothing_varies_has_no_importance():
    found = principal_components(np.zeros((4, 4)))
    assert found.needed_for(0.9) == 0
    np.testing.assert_array_equal(pca_importance(found, 2), np.zeros(4))
    assert explained_by(np.zeros((4, 4)), np.array([1])) == 0.0


@pytest.mark.parametrize("seed", range(30))
def test_diverse_never_takes_a_duplicate_twice(seed):
    samples = probabilities(seed)
    original = int(samples.var(axis=0).argmax())  # the one that most wants to be taken
    samples = with_copy(samples, original)
    for count in (2, 6, 11):
        taken = select_diverse(np.cov(samples.T), usage_of(samples), count)
        assert not {original, 12} <= set(taken.experts_T.tolist())
        assert taken.independent == count


def test_the_original_method_does_take_a_duplicate_twice():
    samples = with_copy(probabilities(0, spread=np.eye(12)[3] * 3 + 1), 3)
    importance = pca_importance(principal_components(np.cov(samples.T)), 20)
    assert {3, 12} <= set(select_highest(importance, 4).experts_T.tolist())


@pytest.mark.parametrize("seed", range(30))
def test_an_important_expert_is_always_taken(seed):
    # It is used more than any other and moves on its own.
    rng = np.random.default_rng(seed)
    planted = int(rng.integers(12))
    logits = rng.normal(size=(3000, 12))
    logits[:, planted] += 1.5 + 2 * rng.normal(size=3000)
    samples = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    covariance, usage = np.cov(samples.T), usage_of(samples)
    importance = pca_importance(principal_components(covariance), 20)
    for taken in (
        select_diverse(covariance, usage, 2),
        select_highest(usage, 2),
        select_highest(importance, 2),
    ):
        assert planted in taken.experts_T


@pytest.mark.parametrize("seed", range(5))
def test_diverse_takes_the_largest_conditional_variance_at_every_step(seed):
    samples = probabilities(seed)
    usage = usage_of(samples)
    taken = select_diverse(np.cov(samples.T), usage, 8).experts_T.tolist()
    centred = samples - samples.mean(axis=0)
    for step in range(8):
        # Regress every expert on those taken before; what is left is its residual.
        before = centred[:, taken[:step]]
        residual = centred - before @ np.linalg.lstsq(before, centred, rcond=None)[0]
        weighted = usage * residual.var(axis=0)
        weighted[taken[:step]] = -1
        assert int(weighted.argmax()) == taken[step]


def test_diverse_explains_more_than_importance_where_experts_repeat_each_other():
    samples = probabilities(2)
    for _ in range(3):
        samples = with_copy(samples, int(samples.var(axis=0).argmax()))
    covariance = np.cov(samples.T)
    diverse = select_diverse(covariance, usage_of(samples), 5).experts_T
    importance = pca_importance(principal_components(covariance), 20)
    repeated = select_highest(importance, 5).experts_T
    assert explained_by(covariance, diverse) > explained_by(covariance, repeated)


@pytest.mark.parametrize("experts", [[0], [3, 7], [0, 1, 2, 3, 4], list(range(11))])
def test_explained_variance_is_that_of_a_regression(experts):
    samples = probabilities(4)
    centred = samples - samples.mean(axis=0)
    known = centred[:, experts]
    residual = centred - known @ np.linalg.lstsq(known, centred, rcond=None)[0]
    expected = 1 - residual.var(axis=0).sum() / centred.var(axis=0).sum()
    assert explained_by(np.cov(samples.T), np.array(experts)) == pytest.approx(expected, abs=1e-9)


def test_when_all_is_explained_the_rest_is_filled_by_usage_and_said():
    samples = with_copy(with_copy(probabilities(0, experts=4), 1), 2)  # rank 3 of 6
    usage = usage_of(samples)
    taken = select_diverse(np.cov(samples.T), usage, 6)
    assert taken.independent == 3
    assert sorted(taken.experts_T.tolist()) == list(range(6))
    rest = taken.experts_T[3:]
    assert list(usage[rest]) == sorted(usage[rest], reverse=True)
    np.testing.assert_array_equal(taken.score_T[3:], 0.0)


def test_an_expert_that_is_never_used_comes_last():
    samples = probabilities(1)
    usage = usage_of(samples)
    usage[5] = 0.0
    assert 5 not in select_diverse(np.cov(samples.T), usage, 11).experts_T


def test_ties_go_to_the_lower_index():
    assert select_highest(np.array([1.0, 2.0, 2.0, 0.0]), 3).experts_T.tolist() == [1, 2, 0]


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.4, 1), (0.5, 2), (0.89, 3), (1.0, 4)])
def test_a_share_of_usage_counts_the_experts_that_hold_it(share, count):
    order = select_highest(np.array([4.0, 3.0, 2.0, 1.0]), 4)
    assert order.count_for(share, np.array([0.4, 0.1, 0.39, 0.11])) == count


def test_where_the_order_adds_no_usage_all_its_experts_are_counted():
    order = select_highest(np.array([3.0, 2.0, 1.0]), 2)
    assert order.count_for(0.5, np.array([0.0, 0.1, 0.9])) == 2


@pytest.mark.parametrize("count", [0, 5])
def test_more_experts_than_there_are_is_refused(count):
    with pytest.raises(ValueError, match=f"cannot take {count} of 4"):
        select_highest(np.ones(4), count)
    with pytest.raises(ValueError, match=f"cannot take {count} of 4"):
        select_diverse(np.eye(4), np.ones(4), count)


def test_families_join_experts_that_move_together_and_no_others():
    rng = np.random.default_rng(0)
    moods = rng.normal(size=(2000, 2))
    samples = rng.normal(size=(2000, 7))
    samples[:, [0, 3, 6]] = moods[:, [0]] + 0.1 * samples[:, [0, 3, 6]]
    samples[:, [1, 5]] = moods[:, [1]] * [1, -1] + 0.1 * samples[:, [1, 5]]  # opposites count
    families = expert_families(np.cov(samples.T), max_distance=0.5)
    assert families.groups() == [[0, 3, 6], [1, 5]]
    assert sorted(families.order_E.tolist()) == list(range(7))
    ordered = families.label_E[families.order_E]
    assert (np.diff(ordered) >= 0).all()  # a family is one block of the ordered matrix


def test_an_expert_that_never_varies_has_a_family_of_its_own():
    covariance = np.diag([1.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(correlation(covariance), np.eye(4))
    assert expert_families(covariance, max_distance=0.5).groups() == []
    assert expert_families(np.ones((1, 1)), max_distance=0.5).groups() == []
