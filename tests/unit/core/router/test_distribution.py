import numpy as np
import pytest

from nexus_cli.core.router.distribution import layer_distribution, overall_distribution

SIZES = [2, 4, 8, 32, 128]


def one_sided(share, top, experts):
    """``top`` experts hold ``share``, the others the rest, evenly."""
    return np.array([share / top] * top + [(1 - share) / (experts - top)] * (experts - top))


@pytest.mark.parametrize("experts", SIZES)
def test_a_layer_is_described_for_any_number_of_experts(experts):
    importance = np.random.default_rng(0).random(experts)
    found = layer_distribution(importance)
    sizes = [int(n) for n in found["top_fractions"]]
    assert sizes == [n for n in (4, 8, 16, 32) if n <= max(4, experts)]
    for n in sizes:
        expected = np.sort(importance)[-n:].sum() / importance.sum()
        assert found["top_fractions"][str(n)] == pytest.approx(expected)
    assert found["percentiles"]["p90"] == pytest.approx(np.quantile(importance, 0.9))


def test_the_largest_gap_is_found():
    gap = layer_distribution(np.array([1.0, 9.0, 2.0, 8.5, 1.5]))["largest_gap"]
    assert gap == {"after_rank": 2, "value": 6.5}


def test_one_expert_is_described_too():
    found = overall_distribution(np.array([[0.4], [0.2]]), [[0], [0]])
    assert found["pattern"] == "even"
    assert found["largest_gap_after_rank"] == {"mean": 1.0, "least": 1, "most": 1}
    assert layer_distribution(np.array([0.4]))["largest_gap"] == {"after_rank": 1, "value": 0.0}


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.71, "steep"), (0.69, "moderate"), (0.51, "moderate"), (0.49, "gradual"),
     (0.36, "gradual"), (0.34, "even"), (4 / 128, "even")],
)  # fmt: skip
def test_for_128_experts_the_verdict_is_the_originals(share, verdict):
    layer = one_sided(share, 4, 128)
    found = overall_distribution(np.stack([layer, layer]), [[0, 1], [1, 2]])
    assert found["pattern"] == verdict
    assert found["mean_top4_fraction"] == pytest.approx(share)


@pytest.mark.parametrize("experts", SIZES)
def test_equal_experts_are_even_and_a_single_one_is_steep(experts):
    equal, single = np.ones((3, experts)), np.zeros((3, experts))
    single[:, 1] = 1.0
    assert overall_distribution(equal, [[0]] * 3)["pattern"] == "even"
    assert overall_distribution(single, [[0]] * 3)["pattern"] == "steep"


@pytest.mark.parametrize(("experts", "top"), [(2, 1), (4, 1), (8, 1), (16, 2), (32, 4), (128, 4)])
def test_the_verdict_goes_by_an_eighth_of_the_experts_and_four_at_most(experts, top):
    found = overall_distribution(one_sided(0.9, top, experts)[None], [[0]])["pattern_of"]
    assert found == {
        "top": top, "mean_fraction": pytest.approx(0.9), "even_fraction": top / experts,
    }  # fmt: skip


def test_layers_are_described_together():
    layers = np.array([[8.0, 1, 1, 0, 0, 0, 0, 0], [2, 2, 2, 2, 1, 1, 0, 0]])
    found = overall_distribution(layers, [[0, 1], [1, 2]])
    assert found["mean_top_fractions"] == {"4": pytest.approx(0.9), "8": pytest.approx(1.0)}
    assert found["largest_gap_after_rank"] == {"mean": 2.5, "least": 1, "most": 4}
    assert found["reuse"] == {
        "selections": 4, "distinct_indices": 3, "selections_per_index": pytest.approx(4 / 3),
        "most_selected": [[1, 2], [0, 1], [2, 1]],
    }  # fmt: skip
    assert found["percentiles"]["p75"] == pytest.approx(np.quantile(layers, 0.75))
