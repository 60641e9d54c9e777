"""Shared experts of whole hidden units: what they compute, and which units are taken."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nexus_cli.config.collect import CollectConfig
from nexus_cli.config.convert import ConvertConfig
from nexus_cli.config.pca import PcaConfig
from nexus_cli.core.model.gpt_oss.export import NEXUS_SHARD
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import model_dir, unit_contributions
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import collect, convert, convert_choice, pca

EXPERTS = [[6, 1, 3], [2, 7, 0]]
WIDTH = 32


@pytest.fixture
def stats(tiny_model_dir, tmp_path):
    """Chosen experts, their usage, and random contributions of their units."""
    path = tmp_path / "stats" / "pca_stats.json"
    path.parent.mkdir()
    rng = np.random.default_rng(0)
    usage = rng.dirichlet(np.ones(8), size=2)
    entry = unit_contributions.write(
        unit_contributions.path_beside(path), rng.exponential(size=(2, 8, WIDTH))
    )
    layers = {
        f"layer_{i}": {"top_expert_indices": EXPERTS[i], "usage": usage[i].tolist()}
        for i in range(2)
    }
    document = {
        "format": "nexus.pca_stats/1",
        "model_fingerprint": model_dir.fingerprint(tiny_model_dir),
        "num_layers": 2,
        "num_experts": 8,
        "top_k": 3,
        "layers": layers,
        "unit_contributions": entry,
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def converted(tiny_model_dir, stats, tmp_path):
    def run(**settings):
        settings = {
            "model": str(tiny_model_dir), "pca_stats": stats, "init_strategy": "neurons",
            "start": "scaled", "output_scale": 1.0, "output": tmp_path / "out",
        } | settings  # fmt: skip
        convert.run(ConvertConfig(**settings), Workspace(tmp_path / "workspace"))
        return settings["output"]

    return run


def outputs(folder, layer, x_TH):
    """The shared expert's output, and every routed expert's, each alone with weight one."""
    moe = load_model(folder, dtype=torch.float32).model.layers[layer].mlp
    alone = [
        moe.experts(x_TH, torch.ones(len(x_TH), 1), torch.full((len(x_TH), 1), expert))
        for expert in range(8)
    ]
    return moe.shared_expert(x_TH), alone, moe.experts.down_proj_bias.float()


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_all_units_of_some_experts_compute_the_sum_of_these(converted, stats, layer):
    folder = converted(shared_intermediate_size=3 * WIDTH)
    x_TH = torch.randn(7, 64)
    found, alone, bias_EH = outputs(folder, layer, x_TH)
    usage = torch.tensor(json.loads(stats.read_text())["layers"][f"layer_{layer}"]["usage"])
    share = usage[EXPERTS[layer]] / usage[EXPERTS[layer]].sum()
    expected = sum(alone[e] - bias_EH[e] for e in EXPERTS[layer])
    expected = expected + share @ bias_EH[EXPERTS[layer]]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_weighted_units_compute_the_sum_by_usage(converted, stats):
    folder = converted(init_strategy="neurons_weighted", shared_intermediate_size=3 * WIDTH)
    x_TH = torch.randn(7, 64)
    found, alone, _ = outputs(folder, 1, x_TH)
    usage = json.loads(stats.read_text())["layers"]["layer_1"]["usage"]
    expected = sum(usage[e] * alone[e] for e in EXPERTS[1])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_the_units_that_contribute_most_are_taken(converted, stats):
    record = json.loads((converted() / "conversion_metadata.json").read_text())["units"]
    with np.load(stats.with_name("pca_stats.units.npz")) as file:
        contribution = file["contribution"]
    for layer, chosen in enumerate(record["experts"]):
        ranked = sorted(
            ((contribution[layer, e, u], e) for e in EXPERTS[layer] for u in range(WIDTH)),
            reverse=True,
        )[:WIDTH]
        assert dict(map(tuple, chosen)) == {
            e: sum(owner == e for _, owner in ranked) for e in {owner for _, owner in ranked}
        }
        assert record["share_of_contribution"][layer] == pytest.approx(
            sum(value for value, _ in ranked) / contribution[layer].sum()
        )


@pytest.mark.parametrize("width", [16, 4 * WIDTH])
def test_narrower_and_wider_ones_have_the_width_that_was_asked_for(converted, width):
    tensors = load_file(converted(shared_intermediate_size=width) / NEXUS_SHARD)
    down = tensors["model.layers.0.mlp.shared_expert.down_proj.weight"]
    assert down.shape == (64, width)
    # three experts have 96 units; what is more says nothing yet
    assert (down.abs().sum(0) > 0).sum() == min(width, 3 * WIDTH)


def test_the_first_experts_alone_can_be_asked_for(converted):
    record = json.loads(
        (converted(init_strategy="neurons_top1") / "conversion_metadata.json").read_text()
    )
    assert record["units"]["experts"] == [[[6, WIDTH]], [[2, WIDTH]]]


@pytest.mark.parametrize("start", ["gate", "zero-down"])
@torch.no_grad()
def test_the_model_starts_as_the_base(converted, tiny_model_dir, start):
    ids = torch.randint(0, 8000, (2, 24))
    base = load_model(tiny_model_dir)(input_ids=ids).logits
    assert torch.equal(load_model(converted(start=start))(input_ids=ids).logits, base)


def test_collect_and_pca_write_what_it_needs(tiny_model_dir, tmp_path):
    workspace = Workspace(tmp_path / "ws")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"some words {i} " * 12}) for i in range(40)))
    settings = {"model": str(tiny_model_dir), "data": {"sources": str(text)}}
    collect.run(CollectConfig(**settings, target_tokens=500, runtime={"device": "cpu"}), workspace)
    pca.run(PcaConfig(top_k=3), workspace)
    assert (workspace.stage_dir("pca") / "pca_plots" / "unit_contributions.png").exists()
    document = json.loads((workspace.stage_dir("pca") / "pca_stats.json").read_text())
    convert.run(ConvertConfig(model=str(tiny_model_dir), init_strategy="neurons"), workspace)
    record = workspace.stage_dir("convert") / "model" / "conversion_metadata.json"
    made_of = json.loads(record.read_text())["units"]["share_of_contribution"]
    for layer, share in zip(document["layers"].values(), made_of, strict=True):
        assert layer["unit_share"]["chosen_experts"] == pytest.approx(share)
        assert share < layer["unit_share"]["all_experts"] < 1


def test_statistics_without_units_are_one_clear_error(converted, stats):
    document = json.loads(stats.read_text())
    del document["unit_contributions"]
    stats.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="does not say what hidden units contribute") as caught:
        converted()
    assert "pca_topK" in caught.value.hint


@pytest.mark.parametrize("damage", ["gone", "cut short", "of other statistics"])
def test_a_damaged_file_of_units_is_one_clear_error(converted, stats, damage):
    file = unit_contributions.path_beside(stats)
    if damage == "gone":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        unit_contributions.write(file, np.ones((2, 8, WIDTH)))
    with pytest.raises(ArtifactError, match=r"pca_stats\.units\.npz is"):
        converted()


@pytest.mark.parametrize(
    ("stats_name", "units_name"),
    [("mine.json", "pca_stats.units.npz"), ("mine.json", "mine.units.npz")],
)
def test_statistics_and_units_may_be_copied_under_another_name(
    converted, stats, tmp_path, stats_name, units_name
):
    folder = tmp_path / "copied"
    folder.mkdir()
    shutil.copy(stats, folder / stats_name)
    shutil.copy(unit_contributions.path_beside(stats), folder / units_name)
    assert (converted(pca_stats=folder / stats_name) / "conversion_metadata.json").exists()


def test_statistics_copied_alone_name_the_file_that_is_left_behind(converted, stats, tmp_path):
    (tmp_path / "copied").mkdir()
    alone = shutil.copy(stats, tmp_path / "copied" / "mine.json")
    with pytest.raises(ArtifactError, match=r"pca_stats\.units\.npz is missing") as caught:
        converted(pca_stats=alone)
    assert "copy both files" in caught.value.hint


def test_units_are_looked_for_beside_the_statistics_only(converted, stats, tmp_path):
    elsewhere = unit_contributions.path_beside(stats).rename(tmp_path / "elsewhere.npz")
    document = json.loads(stats.read_text())
    document["unit_contributions"]["file"] = str(elsewhere)
    stats.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"stats/elsewhere\.npz is missing"):
        converted()


@pytest.mark.parametrize("name", [None, 3, [], "", "..", "a\0b"])
def test_a_name_of_units_that_is_none_is_one_clear_error(converted, stats, name):
    unit_contributions.path_beside(stats).unlink()
    document = json.loads(stats.read_text())
    document["unit_contributions"]["file"] = name
    stats.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"name no file|is missing"):
        converted()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "no unit of the experts chosen in layer 1 contributes anything"),
        (np.inf, "layer 1 contribute is not finite"),
        (np.nan, "layer 1 contribute is not finite"),
        (-1.0, "layer 1 contribute is not finite, or is negative"),
    ],
)
def test_contributions_that_rank_no_unit_are_refused(converted, stats, tmp_path, value, said):
    contribution = np.ones((2, 8, WIDTH))
    contribution[1] = value
    document = json.loads(stats.read_text())
    document["unit_contributions"] = unit_contributions.write(
        unit_contributions.path_beside(stats), contribution
    )
    stats.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=said) as caught:
        converted()
    assert "pca_topK" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_contributions_of_nothing_do_no_harm_where_experts_are_averaged(converted, stats):
    document = json.loads(stats.read_text())
    document["unit_contributions"] = unit_contributions.write(
        unit_contributions.path_beside(stats), np.zeros((2, 8, WIDTH))
    )
    stats.write_text(json.dumps(document))
    assert converted(init_strategy="pca_topK").exists()


def test_the_default_takes_as_many_experts_as_layers_name(stats, tiny_model_dir, tmp_path):
    model, output = str(tiny_model_dir), tmp_path / "out"
    config = ConvertConfig(model=model, pca_stats=stats, output=output)
    convert.run(config, Workspace(tmp_path / "workspace"))
    record = json.loads((output / "conversion_metadata.json").read_text())
    assert [[e for _, e in layer] for layer in record["experts"]] == EXPERTS


def test_the_default_takes_no_more_than_eight_experts(tiny_model_dir):
    config = ConvertConfig(model=str(tiny_model_dir))
    places = convert_choice._first(config, [list(range(12)), [5]], 12, Path("pca_stats.json"))
    assert places == [[(0, e) for e in range(8)], [(1, 5)]]


def test_the_defaults_strategy_is_strict_where_it_is_asked_for(converted):
    with pytest.raises(ConfigError, match="neurons_weighted_top8 needs 8 experts a layer"):
        converted(init_strategy="neurons_weighted_top8")


def test_units_of_experts_of_another_width_are_refused(converted, stats):
    document = json.loads(stats.read_text())
    file = unit_contributions.path_beside(stats)
    document["unit_contributions"] = unit_contributions.write(file, np.ones((2, 8, 16)))
    stats.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"\[2, 8, 16\]"):
        converted()


def test_more_experts_than_the_statistics_name_are_refused(converted):
    with pytest.raises(ConfigError, match="neurons_top5 needs 5 experts"):
        converted(init_strategy="neurons_top5")
