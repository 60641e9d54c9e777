"""A base that differs from the right one in one tensor alone: to everything it is another model."""

from __future__ import annotations

import json
import shutil

import pytest

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.model.gpt_oss.adapter import write_adapter
from nexus_cli.errors import ArtifactError
from nexus_cli.io import model_dir
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert

EMBEDDING = "model.embed_tokens.weight"  # the one tensor of the test's model of more than 2 MiB
CHANGED = [
    "model.layers.0.mlp.router.weight",
    "model.layers.1.mlp.router.bias",
    "model.layers.0.mlp.experts.gate_up_proj_bias",
    "model.layers.1.input_layernorm.weight",
    EMBEDDING,
]


@pytest.fixture(scope="module")
def base(make_tiny_model, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "base", vocab_size=20_000)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapter")
    config = ConvertConfig(model=str(base), init_strategy="random", output=root / "model")
    convert.run(config, Workspace(root / "w"))
    write_adapter(root / "adapter", root / "model")
    return root / "adapter"


@pytest.fixture(params=CHANGED)
def other(base, tmp_path, request):
    """A copy of the base; of one tensor every bit is the other one."""
    folder = shutil.copytree(base, tmp_path / "other")
    shard = folder / model_dir.weight_map(folder)[request.param]
    content = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    start, stop = model_dir.read_header(shard)[request.param]["data_offsets"]
    span = slice(begin + start, begin + stop)
    content[span] = bytes(255 - byte for byte in content[span])
    shard.write_bytes(content)
    return folder


def test_its_fingerprint_is_another(base, other):
    assert model_dir.fingerprint(other) != model_dir.fingerprint(base)


def test_an_adapter_is_not_put_on_it(adapter, other, tmp_path):
    config = ConvertConfig(model=str(adapter), base=str(other), output=tmp_path / "out")
    with pytest.raises(ArtifactError, match="is not the model that"):
        convert.run(config, Workspace(tmp_path / "w"))
    assert not (tmp_path / "out").exists()


def test_statistics_of_the_right_one_are_refused_for_it(base, other, tmp_path):
    layer = {"top_expert_indices": [0, 1, 2], "usage": [1 / 8] * 8}
    document = {
        "format": "nexus.pca_stats/1",
        "model_fingerprint": model_dir.fingerprint(base),
        "num_layers": 2,
        "num_experts": 8,
        "top_k": 3,
        "layers": {"layer_0": layer, "layer_1": layer},
    }
    (tmp_path / "stats.json").write_text(json.dumps(document))
    config = ConvertConfig(
        model=str(other),
        init_strategy="pca_topK",
        pca_stats=tmp_path / "stats.json",
        output=tmp_path / "out",
    )
    with pytest.raises(ArtifactError, match="another model"):
        convert.run(config, Workspace(tmp_path / "w"))


def test_a_model_that_is_linked_to_it_says_that_its_base_changed(base, other, tmp_path):
    model = tmp_path / "model"
    config = ConvertConfig(model=str(base), init_strategy="random", output=model, copy_shards=True)
    convert.run(config, Workspace(tmp_path / "w"))
    for shard in other.glob("model-*.safetensors"):
        shutil.copyfile(shard, model / shard.name)
    with pytest.raises(ArtifactError, match="has changed since it was converted"):
        model_dir.fingerprint(model)
