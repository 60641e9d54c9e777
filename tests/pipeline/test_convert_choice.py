"""Which experts a conversion starts from, where layers differ and where only counts are known."""

import json

import pytest

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import model_dir
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert

COUNTS = [[1, 9, 3, 0, 2, 5, 4, 0], [7, 1, 0, 2, 8, 3, 4, 5]]
CHOSEN = [[1, 5, 3], [4]]


@pytest.fixture
def chosen(tiny_model_dir, tmp_path):
    """Chosen experts, three of one layer and one of the other, as ``--explained`` gives."""
    path = tmp_path / "pca_stats.json"
    layers = {
        f"layer_{i}": {"top_expert_indices": CHOSEN[i], "usage": [0.125] * 8} for i in range(2)
    }
    document = {
        "format": "nexus.pca_stats/1",
        "model_fingerprint": model_dir.fingerprint(tiny_model_dir),
        "num_layers": 2,
        "num_experts": 8,
        "top_k": None,
        "explained": 0.8,
        "layers": layers,
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def counted(tmp_path):
    """Activation counts in the original tool's layout."""
    path = tmp_path / "activations.json"
    layers = {
        f"layer_{i}": {
            "top_expert_idx": row.index(max(row)),
            "top_expert_count": max(row),
            "activation_counts": row,
        }
        for i, row in enumerate(COUNTS)
    }
    path.write_text(json.dumps({"num_layers": 2, "num_experts": 8, "top_k": 2, "layers": layers}))
    return path


@pytest.fixture
def metadata(tiny_model_dir, tmp_path):
    """Convert, and return what the folder says it was made from."""

    def run(stats, strategy):
        config = ConvertConfig(
            model=str(tiny_model_dir),
            output=tmp_path / "out",
            pca_stats=stats,
            init_strategy=strategy,
        )
        convert.run(config, Workspace(tmp_path / "w"))
        return json.loads((tmp_path / "out" / "conversion_metadata.json").read_text())

    return run


def experts(record):
    return [[tuple(place) for place in layer] for layer in record["experts"]]


def test_every_expert_that_a_layer_names_is_taken(metadata, chosen):
    record = metadata(chosen, "pca_topK")
    assert experts(record) == [[(0, 1), (0, 5), (0, 3)], [(1, 4)]]


def test_the_first_of_layers_that_differ_can_be_taken(metadata, chosen):
    assert experts(metadata(chosen, "pca_top1")) == [[(0, 1)], [(1, 4)]]


def test_more_experts_than_a_layer_names_is_an_error_that_names_the_layer(
    metadata, chosen, tmp_path
):
    with pytest.raises(ConfigError, match=r"pca_top2 needs 2 .* names 1 in layer 1") as caught:
        metadata(chosen, "pca_top2")
    assert "nexus pca --top-k 2" in caught.value.hint
    assert "pca_top1" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_nothing_is_suggested_that_the_model_has_no_experts_for(metadata, chosen):
    with pytest.raises(ConfigError, match="the model has 8") as caught:
        metadata(chosen, "pca_top9")
    assert caught.value.hint == "use --init-strategy pca_top1"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("top1", [[(0, 1)], [(1, 4)]]),
        ("top1_average", [[(0, 1)], [(0, 1)]]),  # 9 of 24, against 8 of 30
        ("top4_average", [[(0, 1), (0, 5), (0, 6), (0, 2)], [(1, 4), (1, 0), (1, 7), (1, 6)]]),
    ],
)
def test_counts_alone_serve_the_strategies_that_go_by_usage(metadata, counted, strategy, expected):
    assert experts(metadata(counted, strategy)) == expected


def test_the_most_used_of_all_goes_by_share_and_not_by_count(metadata, counted):
    document = json.loads(counted.read_text())
    document["layers"]["layer_1"]["activation_counts"] = [70, 10, 0, 20, 80, 30, 40, 50]
    counted.write_text(json.dumps(document))
    assert experts(metadata(counted, "top1_average")) == [[(0, 1)], [(0, 1)]]


@pytest.mark.parametrize("strategy", ["pca_topK", "pca_top4"])
def test_counts_alone_name_no_chosen_experts(metadata, counted, strategy, tmp_path):
    with pytest.raises(ConfigError, match=f"{strategy} needs chosen experts") as caught:
        metadata(counted, strategy)
    assert "nexus pca" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_it_is_said_that_counts_name_no_model(metadata, counted, caplog, monkeypatch):
    monkeypatch.setattr("nexus_cli.io.console.configure", lambda *_: None)
    metadata(counted, "top1")
    assert "does not say which model it counted" in caplog.text
    assert "2 layers of 8 experts" in caplog.text


def test_counts_of_a_model_of_another_size_are_refused(metadata, counted):
    document = json.loads(counted.read_text())
    document["num_experts"] = 9
    for layer in document["layers"].values():
        layer["activation_counts"].append(1)
    counted.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"2 layers of 9 experts; .* has 2 of 8"):
        metadata(counted, "top1")
