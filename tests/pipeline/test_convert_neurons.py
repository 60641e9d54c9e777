"""Shared experts of whole hidden units: what they compute, and which units are taken."""

import json

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
from nexus_cli.pipeline import collect, convert, pca

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
