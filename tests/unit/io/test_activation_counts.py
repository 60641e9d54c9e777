"""Activation counts in the original tool's layout, and what is refused of them."""

import json

import pytest

from nexus_cli.errors import ArtifactError
from nexus_cli.io.pca_stats import load_pca_stats

COUNTS = [[10, 0, 30, 60], [1, 1, 1, 1]]


def document(counts=COUNTS, **changes):
    layers = {
        f"layer_{i}": {
            "top_expert_idx": max(range(len(row)), key=row.__getitem__),
            "top_expert_count": max(row),
            "activation_counts": row,
        }
        for i, row in enumerate(counts)
    }
    return {"num_layers": 2, "num_experts": 4, "top_k": 4, "layers": layers} | changes


@pytest.fixture
def load(tmp_path):
    def run(content):
        path = tmp_path / "activations.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_pca_stats(path)

    return run


def test_usage_is_each_experts_share_of_its_layers_counts(load):
    stats = load(document())
    assert stats.usage == ((0.1, 0.0, 0.3, 0.6), (0.25, 0.25, 0.25, 0.25))
    assert (stats.num_layers, stats.num_experts) == (2, 4)


def test_no_model_and_no_choice_are_made_up(load):
    stats = load(document())
    assert stats.model_fingerprint is None
    assert stats.experts is None
    assert stats.top_k is None  # in the file it is experts a token


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1, 2, -3, 4], "-3 for expert 2 is no count"),
        ([1, 2, 3], "3 counts for 4 experts"),
        ([1, 2, 3, 4, 5], "5 counts for 4 experts"),
        ([0, 0, 0, 0], "all are zero"),
        ([1, float("nan"), 3, 4], "nan for expert 1 is no count"),
        ([1, 2, float("inf"), 4], "inf for expert 2 is no count"),
        ([1, 2, 10**400, 4], f"1{'0' * 23} for expert 2 is no count"),
        ([1, 2, 3, "4"], "'4' for expert 3 is no number"),
        ([1, 2, 3, True], "True for expert 3 is no number"),
        ([1, 2, 3, None], "None for expert 3 is no number"),
    ],
)
def test_bad_counts_are_one_clear_error_that_names_the_layer(load, row, said):
    content = document()
    content["layers"]["layer_1"]["activation_counts"] = row
    with pytest.raises(ArtifactError) as caught:
        load(content)
    assert f"activation_counts of layer_1: {said}" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 3}, "holds 2 layers, fewer than its num_layers, 3"),
        ({"num_layers": 1}, "holds 2 layers, more than its num_layers, 1"),
        ({"num_layers": None}, "lacks num_layers"),
        ({"num_experts": "4"}, "lacks num_experts"),
        ({"num_experts": 0}, "lacks num_experts"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(load, changes, said):
    with pytest.raises(ArtifactError, match=said):
        load(document(**changes))


@pytest.mark.parametrize("layer", [{}, {"activation_counts": 3}, []])
def test_a_layer_without_counts_is_named(load, layer):
    content = document()
    content["layers"]["layer_0"] = layer
    with pytest.raises(ArtifactError, match="layer_0: has no list"):
        load(content)


def test_a_layer_by_another_name_is_no_layer(load):
    content = document()
    content["layers"]["layer_7"] = content["layers"].pop("layer_1")
    with pytest.raises(ArtifactError, match="layer_1: has no list"):
        load(content)


@pytest.mark.parametrize("content", ["{}", '{"layers": {}}', '{"layers": {"layer_0": 1}}'])
def test_a_file_of_neither_kind_is_said_to_be_neither(load, content):
    with pytest.raises(ArtifactError, match=r"not a nexus\.pca_stats/1 file, and holds no act"):
        load(content)
