"""What a model folder says about itself, and what damage is told."""

import json
import shutil

import pytest

from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import model_dir


@pytest.fixture
def copy(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("layers", "experts", "parameters"),
    [(24, 32, 597_404_160 + 24), (36, 128, 896_106_240 + 36)],
    ids=["20B", "120B"],
)
def test_any_size_of_the_family_is_recognised(tmp_path, layers, experts, parameters):
    """The parameter counts are 3 * 2880^2 + 3 * 2880 a layer, and one gate."""
    config = {
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "experts_per_token": 4,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "vocab_size": 201088,
        "num_shared_experts": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = model_dir.read_shape(tmp_path)
    assert (shape.num_layers, shape.num_experts, shape.top_k) == (layers, experts, 4)
    assert shape.shared_parameters == parameters


def test_a_model_that_is_not_gpt_oss_is_refused(copy):
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "llama"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="llama"):
        model_dir.read_shape(copy)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no model folder"):
        model_dir.resolve_model(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"config\.json"):
        model_dir.resolve_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_damaged_config_is_named(copy, text):
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"config\.json"):
        model_dir.read_shape(copy)


def test_the_fingerprint_follows_the_weights_and_not_the_place(copy, tiny_model_dir):
    same = model_dir.fingerprint(copy)
    assert same == model_dir.fingerprint(tiny_model_dir)
    shard = copy / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    assert model_dir.fingerprint(copy) != same


def test_a_shard_that_the_index_lists_must_be_there(copy):
    (copy / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"lacks the shard model-00001-of-00001\.safetensors"):
        model_dir.weight_map(copy)


@pytest.mark.parametrize("data", [b"", b"12345678", b"\xff" * 64])
def test_a_file_that_is_not_safetensors_is_named(copy, data):
    shard = copy / "model-00001-of-00001.safetensors"
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match="model-00001"):
        model_dir.read_header(shard)


@pytest.mark.parametrize("header", [b"[1, 2]", b'{"a": 3}', b'{"a": {"dtype": "U8"}}', b"\xff\xff"])
def test_a_header_of_another_form_is_damage(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError, match="damaged header"):
        model_dir.read_header(path)


def test_a_width_of_null_is_the_routed_experts(copy):
    config = json.loads((copy / "config.json").read_text())
    config["shared_expert_intermediate_size"] = None
    (copy / "config.json").write_text(json.dumps(config))
    assert model_dir.read_shape(copy).shared_intermediate_size == config["intermediate_size"]
