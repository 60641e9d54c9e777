import math
from itertools import combinations

import numpy as np
import pytest

from nexus_cli.core.router.coverage import (
    count_types,
    marginal_gain,
    select_documents,
    type_weights,
)
from nexus_cli.core.router.coverage_report import describe_coverage


def documents(seed, count=30, vocab=40, longest=20):
    """Random token sequences with a Zipf-like distribution and very different lengths."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, vocab + 1)
    return [
        rng.choice(vocab, size=rng.integers(2, longest), p=share / share.sum())
        for _ in range(count)
    ]


def worth(texts, chosen, exponent):
    """F, from its definition and nothing else."""
    unique = {tuple(t) for t in texts}
    everything = [token for text in unique for token in text]
    seen = [token for index in chosen for token in texts[index]]
    return sum(
        (everything.count(v) / len(everything)) ** exponent * math.log(1 + seen.count(v))
        for v in set(seen)
    )


def plain_greedy(counts, target, exponent, seed, batch_select=1):
    """Every gain of every remaining document in every round, ties settled by the seed."""
    rest = counts.first_occurrences()
    weight = type_weights(counts.total(rest), exponent)
    tie = np.random.default_rng(seed).permutation(counts.num_documents)
    lengths = counts.lengths()
    chosen, seen = [], np.zeros(counts.num_types, dtype=np.int64)
    while rest and lengths[chosen].sum() < target:
        ratio = {i: marginal_gain(*counts.of(i), seen, weight) / lengths[i] for i in rest}
        best = sorted(rest, key=lambda i: (-ratio[i], tie[i]))[:batch_select]
        for document in best:
            if lengths[chosen].sum() < target:
                rest.remove(document)
                chosen.append(document)
        seen = counts.total(chosen)
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("target", [1, 120, 10**6])
def test_lazy_greedy_takes_what_plain_greedy_takes(seed, exponent, target):
    counts = count_types(documents(seed, vocab=15))  # few types: many ties
    found = select_documents(counts, target_tokens=target, exponent=exponent, seed=seed)
    assert list(found.documents) == plain_greedy(counts, target, exponent, seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch_select", [2, 7, 100])
@pytest.mark.parametrize("target", [1, 120, 10**6])
def test_a_round_takes_the_best_of_the_gains_at_its_start(seed, batch_select, target):
    counts = count_types(documents(seed, vocab=15))
    found = select_documents(counts, target_tokens=target, batch_select=batch_select, seed=seed)
    assert list(found.documents) == plain_greedy(counts, target, 0.5, seed, batch_select)


def test_texts_of_one_round_do_not_see_each_other():
    texts = [np.array(t) for t in ([1, 2, 3, 4], [1, 2, 3, 4, 4], [5, 6, 6, 6], [7] * 9)]
    counts = count_types(texts)
    # The second says what the first does: alone it is worth more than the third, after it less.
    apart = select_documents(counts, target_tokens=7, exponent=0.5)
    together = select_documents(counts, target_tokens=7, exponent=0.5, batch_select=2)
    assert apart.documents == (0, 2)
    assert together.documents == (0, 1)


def test_larger_rounds_compute_fewer_gains():
    counts = count_types(documents(0, count=400, vocab=2000, longest=60))
    computed = [
        select_documents(counts, target_tokens=4000, batch_select=n).gains_computed
        for n in (1, 8, 64, 1000)
    ]
    assert computed == sorted(computed, reverse=True)
    assert computed[-1] == len(counts.first_occurrences())  # none twice


@pytest.mark.parametrize("batch_select", [1, 5])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_value_of_a_selection_is_the_objective_of_its_tokens(exponent, batch_select):
    texts = documents(7)
    found = select_documents(
        count_types(texts), target_tokens=100, exponent=exponent, batch_select=batch_select
    )
    assert found.value == pytest.approx(worth(texts, found.documents, exponent), rel=1e-12)


def test_lazy_greedy_computes_far_fewer_gains():
    texts = documents(0, count=400, vocab=2000, longest=60)
    found = select_documents(count_types(texts), target_tokens=4000)
    plain = sum(400 - step for step in range(len(found.documents)))
    assert found.gains_computed < plain / 5


@pytest.mark.parametrize("seed", range(20))
def test_the_selection_is_within_the_bound_of_the_best_set(seed):
    texts = documents(seed, count=9, vocab=12, longest=8)
    target = 20
    found = select_documents(count_types(texts), target_tokens=target)
    unique = {tuple(t): i for i, t in enumerate(texts)}.values()
    best = max(
        worth(texts, subset, 0.5)
        for size in range(10)
        for subset in combinations(unique, size)
        if sum(len(texts[i]) for i in subset) <= target
    )
    assert worth(texts, found.documents, 0.5) >= (1 - 1 / math.e) * best


def test_the_budget_is_reached_and_passed_by_one_document_at_most():
    texts = documents(3, count=100)
    found = select_documents(count_types(texts), target_tokens=200)
    lengths = [len(texts[i]) for i in found.documents]
    assert found.tokens == sum(lengths) >= 200
    assert found.tokens - lengths[-1] < 200


def test_a_long_document_has_no_advantage_over_a_short_one_that_says_as_much():
    texts = [np.tile(np.arange(10), 5), np.arange(10)]
    found = select_documents(count_types(texts), target_tokens=5)
    assert found.documents == (1,)


@pytest.mark.parametrize("seed", range(10))
def test_a_duplicate_is_never_chosen(seed):
    texts = documents(seed)
    texts += [text.copy() for text in texts]
    found = select_documents(count_types(texts), target_tokens=10**6)
    assert len({tuple(texts[i]) for i in found.documents}) == len(found.documents)
    assert max(found.documents) < len(texts) // 2


def test_duplicates_do_not_change_what_is_chosen():
    texts = documents(1)
    once = select_documents(count_types(texts), target_tokens=100, seed=3)
    twice = select_documents(count_types([*texts, *texts]), target_tokens=100, seed=3)
    assert set(once.documents) == set(twice.documents)


def test_the_seed_alone_settles_ties():
    texts = [np.array([i]) for i in range(50)]  # all worth the same
    counts = count_types(texts)
    first, again, other = (
        select_documents(counts, target_tokens=10, seed=seed).documents for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_workers_do_not_change_the_counts():
    texts = documents(5, count=1500)
    alone, shared = count_types(texts), count_types(texts, num_processes=2)
    assert alone.digests == shared.digests
    for name in ("start", "type_M", "count_M"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(shared, name))


def test_an_exponent_of_one_reproduces_the_candidates_distribution():
    texts = documents(0, count=500, vocab=30, longest=10)
    counts = count_types(texts)
    kl = {}
    for exponent in (0.0, 1.0):
        found = select_documents(counts, target_tokens=800, exponent=exponent)
        report = describe_coverage(
            counts, found, source_D=[0] * 500, source_names=["all"], vocab_size=30
        )
        kl[exponent] = report["selected"]["kl_from_candidates"]
    assert kl[1.0] < 0.01 < kl[0.0]


def test_a_selection_covers_more_of_the_text_than_a_random_one():
    # Topics of different size: each document speaks of one, in its own words.
    rng = np.random.default_rng(0)
    topics = rng.zipf(1.5, size=600) % 200
    texts = [30 * topic + rng.zipf(1.5, size=rng.integers(5, 40)) % 30 for topic in topics]
    counts = count_types(texts)
    found = select_documents(counts, target_tokens=2000)
    report = describe_coverage(
        counts, found, source_D=[0] * 600, source_names=["all"], vocab_size=6000
    )
    chosen, chance = report["selected"], report["random_selection"]
    assert chosen["token_types"] > 1.3 * chance["token_types"]
    assert chosen["distribution_covered"] > chance["distribution_covered"]


def test_the_report_counts_by_hand():
    texts = [np.array(t) for t in ([1, 1, 2], [3, 4], [1, 1, 2], [5, 5, 5, 5])]
    counts = count_types(texts)
    found = select_documents(counts, target_tokens=2, exponent=0.0)
    assert found.documents == (1,)  # two types with two tokens
    report = describe_coverage(
        counts, found, source_D=[0, 1, 0, 1], source_names=["a", "b"], vocab_size=10
    )
    assert report["candidates"] == {
        "documents": 4, "duplicates_removed": 1, "tokens": 9, "token_types": 5,
    }  # fmt: skip
    assert report["selected"]["share_of_vocabulary"] == 0.2
    assert report["selected"]["distribution_covered"] == pytest.approx(2 / 9)
    assert report["sources"]["a"]["distribution_covered"] == 0.0
    assert report["sources"]["b"]["share_of_candidate_types"] == pytest.approx(2 / 3)
    assert report["sources"]["b"]["selected_tokens"] == 2


def test_a_broken_contract_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        count_types([np.array([], dtype=np.int64)])
    counts = count_types([np.array([1])])
    with pytest.raises(ValueError, match="target_tokens"):
        select_documents(counts, target_tokens=0)
    with pytest.raises(ValueError, match="batch_select"):
        select_documents(counts, target_tokens=1, batch_select=0)
    with pytest.raises(ValueError, match="exponent"):
        select_documents(counts, target_tokens=1, exponent=1.5)
