"""An adapter's sizes against its tensors, before anything is computed of the sizes."""

from __future__ import annotations

import json
import shutil

import pytest

from nexus_cli.core.model.gpt_oss import adapter as adapters
from nexus_cli.core.model.gpt_oss.adapter import read_adapter, write_adapter
from nexus_cli.errors import ArtifactError


@pytest.fixture
def resize(tiny_converted_dir, tmp_path):
    """An adapter whose config names other sizes."""

    def resize(**sizes):
        write_adapter(tmp_path / "adapter", tiny_converted_dir)
        file = tmp_path / "adapter" / "nexus_adapter.json"
        config = json.loads(file.read_text())
        config["shape"] |= sizes
        file.write_text(json.dumps(config))
        return tmp_path / "adapter"

    return resize


def test_more_layers_than_tensors_are_refused_before_the_layers_are_listed(resize, monkeypatch):
    folder = resize(num_layers=1024)
    monkeypatch.setattr(adapters, "_layout", lambda *_: pytest.fail("listed"))
    with pytest.raises(ArtifactError, match=r"holds \d+ tensors, too few for 1024 layers"):
        read_adapter(folder)


def test_a_layer_that_the_tensors_lack_is_named(resize):
    folder = resize(num_layers=3)
    with pytest.raises(ArtifactError, match=r"lacks the tensor model\.layers\.2\.mlp"):
        read_adapter(folder)


def test_a_model_of_a_size_that_no_adapter_has_is_named(tiny_converted_dir, tmp_path):
    model = shutil.copytree(tiny_converted_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 5000}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="no adapter has: num_layers 5000"):
        write_adapter(tmp_path / "adapter", model)
