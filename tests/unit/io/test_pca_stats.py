"""Files of nexus pca: those written before, those of layers that differ, and damaged ones."""

import json

import pytest

from nexus_cli.errors import ArtifactError
from nexus_cli.io.pca_stats import load_pca_stats


def document(experts=((1, 0), (2, 3)), top_k=2, **changes):
    layers = {
        f"layer_{i}": {"top_expert_indices": list(chosen), "usage": [0.25] * 4}
        for i, chosen in enumerate(experts)
    }
    return {
        "format": "nexus.pca_stats/1",
        "model_fingerprint": "f",
        "num_layers": 2,
        "num_experts": 4,
        "top_k": top_k,
        "layers": layers,
    } | changes


@pytest.fixture
def load(tmp_path):
    def run(content):
        path = tmp_path / "pca_stats.json"
        path.write_text(json.dumps(content))
        return load_pca_stats(path)

    return run


def test_a_file_written_before_layers_could_differ_is_read(load):
    stats = load(document())
    assert (stats.top_k, stats.experts) == (2, ((1, 0), (2, 3)))


def test_layers_may_name_different_numbers_of_experts(load):
    stats = load(document(experts=((1,), (2, 3, 0)), top_k=None))
    assert (stats.top_k, stats.experts) == (None, ((1,), (2, 3, 0)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (document(experts=((1,), (2, 3))), "layer 0 names 1 experts, not 2"),
        (document(experts=((1, 0), ()), top_k=None), "layer 1 names 0 experts, not one or more"),
        (document(experts=((1, 0), (2, 4))), "layer 1 names experts that do not exist"),
        (document(experts=((1, 0), (2, -1))), "layer 1 names experts that do not exist"),
        (document(experts=((1, 0), (2, [3]))), "layer 1 names experts that do not exist"),
        (document(experts=((1, 1), (2, 3))), "layer 0 names an expert twice"),
        (document(num_experts=8), "layer 0 lacks the usage of its experts"),
    ],
)
def test_a_damaged_layer_is_named(load, content, said):
    with pytest.raises(ArtifactError, match=said) as caught:
        load(content)
    assert "nexus pca" in caught.value.hint


@pytest.mark.parametrize(
    "usage",
    [
        [0.25, 0.25, 0.25, None],
        [0.5, 0.5, 0.5, -0.5],
        [0.25, 0.25, 0.25, float("inf")],
        [0.25, 0.25, 0.25, float("nan")],
        [0.25, 0.25, 0.25, 10**400],
    ],
)
def test_usage_that_is_no_share_is_refused(load, usage):
    content = document()
    content["layers"]["layer_1"]["usage"] = usage
    with pytest.raises(ArtifactError, match="layer 1 lacks the usage"):
        load(content)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": "2"}, "its num_layers is no number of one or more: '2'"),
        ({"num_experts": 0}, "its num_experts is no number of one or more: 0"),
        ({"top_k": "2"}, "its top_k is no number of one or more: '2'"),
        ({"layers": [1, 2]}, r"its layers are no entries by name: \[1, 2\]"),
        ({"num_layers": 3}, "it lacks layer_2"),
        ({"layers": {"layer_0": "x"}}, "it lacks layer_0"),
        ({"layers": {"layer_0": {"usage": [1]}}}, "layer 0 lacks a list of its top_expert_indices"),
        ({"layers": {"layer_0": {"top_expert_indices": [1]}}}, "layer 0 lacks a list of its usage"),
    ],
)
def test_what_is_damaged_is_said_in_words(load, changes, said):
    with pytest.raises(ArtifactError, match=f"is damaged: {said}"):
        load(document(**changes))


def test_what_is_missing_is_named(load):
    content = document()
    del content["top_k"]
    with pytest.raises(ArtifactError, match="is damaged: it lacks top_k"):
        load(content)
