"""What `nexus convert` refuses, before it writes anything and in one line."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.model.gpt_oss.export import NEXUS_SHARD
from nexus_cli.errors import ArtifactError, ConfigError, NexusError, ResourceError
from nexus_cli.io import model_dir
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert, convert_plan

FIRST, SECOND = "model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors"


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    """A model to damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.fixture
def refused(tmp_path):
    """Convert, and check that the error is one line with a hint, and that nothing was written."""

    def run(model, kind=NexusError, **settings):
        settings = {"model": str(model), "output": tmp_path / "out"} | settings
        config = ConvertConfig(**({"init_strategy": "random"} | settings))
        for dry_run in (True, False):
            with pytest.raises(kind) as caught:
                convert.run(config, Workspace(tmp_path / "w"), dry_run=dry_run)
            assert "\n" not in str(caught.value)
            assert caught.value.hint
            left = {path.name for path in tmp_path.glob("*out*")}
            assert left <= {".out.lock"}
        return str(caught.value)

    return run


def statistics(model, path, **changes):
    experts = list(range(3))
    usage = [1 / 8] * 8
    document = {
        "format": "nexus.pca_stats/1",
        "model_fingerprint": model_dir.fingerprint(model),
        "num_layers": 2,
        "num_experts": 8,
        "top_k": 3,
        "layers": {f"layer_{i}": {"top_expert_indices": experts, "usage": usage} for i in range(2)},
    }
    path.write_text(json.dumps(document | changes))
    return path


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_shard_that_is_missing(model, refused):
    (model / SECOND).unlink()
    assert f"lacks the shard {SECOND}" in refused(model, ArtifactError)


def test_a_shard_that_is_longer_than_its_header_says(model, refused):
    with (model / SECOND).open("ab") as file:
        file.write(b"more")
    assert f"{SECOND} is too long" in refused(model, ArtifactError)


def test_a_shard_that_lacks_a_tensor_of_the_index(model, refused):
    tensors = load_file(model / SECOND)
    del tensors["lm_head.weight"]
    save_file(tensors, model / SECOND)
    assert f"{SECOND} lacks the tensor lm_head.weight" in refused(model, ArtifactError)


def test_a_shard_that_holds_more_than_the_index_says(model, refused):
    """transformers reads every tensor of every shard: the stale one might win."""
    tensors = load_file(model / SECOND)
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, model / SECOND)
    message = refused(model, ArtifactError)
    assert f"{SECOND} holds model.embed_tokens.weight, which the index lists in {FIRST}" in message


def test_shards_of_another_size_of_the_family(model, refused):
    edit_json(model / "config.json", lambda config: config.update(num_local_experts=16))
    message = refused(model, ArtifactError)
    assert "has U8 [16, 64, 2, 16]" in message
    assert "[8, 64, 2, 16]" in message


def test_a_model_whose_experts_are_not_packed(model, refused):
    tensors = load_file(model / SECOND)
    tensors.pop("model.layers.1.mlp.experts.down_proj_blocks")
    save_file(tensors, model / SECOND)
    edit_json(
        model / model_dir.INDEX,
        lambda index: index["weight_map"].pop("model.layers.1.mlp.experts.down_proj_blocks"),
    )
    assert "no tensor model.layers.1.mlp.experts.down_proj_blocks" in refused(model, ArtifactError)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_that_points_outside(model, refused, name):
    edit_json(
        model / model_dir.INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name})
    )
    assert "points outside its folder" in refused(model, ArtifactError)


def test_experts_that_decode_to_no_number(model, tmp_path):
    tensors = load_file(model / SECOND)
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2] = 255
    save_file(tensors, model / SECOND)
    config = ConvertConfig(
        model=str(model),
        output=tmp_path / "out",
        init_strategy="pca_topK",
        pca_stats=statistics(model, tmp_path / "stats.json"),
    )
    with pytest.raises(
        ArtifactError, match=r"layers\.1\..*down_proj\.weight.*not finite"
    ) as caught:
        convert.run(config, Workspace(tmp_path / "w"))
    assert caught.value.hint
    assert not list(tmp_path.glob("*out*"))[1:]  # the lock alone


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"model_fingerprint": "0" * 64}, {}, "another model"),
        ({"num_experts": 16}, {}, "lacks the usage of its experts"),
        ({}, {"init_strategy": "pca_top4"}, "pca_top4 needs 4 experts a layer"),
        ({"layers": {}}, {}, "damaged"),
        ({"format": "something"}, {}, "is not a nexus.pca_stats/1 file"),
    ],
)
def test_statistics_that_do_not_fit(model, refused, tmp_path, changes, settings, message):
    path = statistics(model, tmp_path / "stats.json", **changes)
    settings = {"init_strategy": "pca_topK", "pca_stats": path} | settings
    assert message in refused(model, **settings)


def test_statistics_of_another_number_of_experts(model, refused, tmp_path):
    path = statistics(model, tmp_path / "stats.json")

    def widen(document):
        document["num_experts"] = 16
        for layer in document["layers"].values():
            layer["usage"] = [1 / 16] * 16

    edit_json(path, widen)
    message = refused(model, ArtifactError, init_strategy="pca_topK", pca_stats=path)
    assert "of 2 layers of 16 experts" in message


def test_a_converted_model(tiny_converted_dir, refused):
    assert "has a shared expert already" in refused(tiny_converted_dir, ConfigError)


def test_a_shared_expert_that_does_not_fit_the_memory(model, refused, monkeypatch):
    monkeypatch.setattr(convert_plan, "_free_memory", lambda: 2**20)
    assert "0.75 GiB of memory, and 0.00 GiB are free" in refused(model, ResourceError)


def test_a_width_beyond_any_disk(model, refused):
    assert "has no room for" in refused(model, ResourceError, shared_intermediate_size=10**12)


@pytest.mark.parametrize("width", ["0", "-8", "2.5", "wide"])
def test_a_width_that_is_no_number_of_units(nexus, tmp_path, width):
    done = nexus("convert", "--shared-intermediate-size", width, "-w", tmp_path / "w")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "shared" in done.stderr


@pytest.mark.parametrize("width", [1, 17, 33])
def test_any_other_width_converts(model, tmp_path, width):
    config = ConvertConfig(
        model=str(model),
        output=tmp_path / "out",
        init_strategy="pca_topK",
        pca_stats=statistics(model, tmp_path / "stats.json"),
        shared_intermediate_size=width,
    )
    convert.run(config, Workspace(tmp_path / "w"))
    stored = load_file(tmp_path / "out" / NEXUS_SHARD)
    assert stored["model.layers.1.mlp.shared_expert.down_proj.weight"].shape == (64, width)


def test_a_dry_run_says_what_is_read_written_and_held(model, tmp_path, capsys):
    config = ConvertConfig(
        model=str(model),
        output=tmp_path / "out",
        init_strategy="pca_topK",
        pca_stats=statistics(model, tmp_path / "stats.json"),
        copy_shards=True,
    )
    convert.run(config, Workspace(tmp_path / "w"), dry_run=True)
    out = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for row in ("read of the experts", "copy", "write", "hold in memory", "12,546"):
        assert row in out


def test_a_forced_conversion_that_does_not_fit_leaves_the_one_before(
    model, tmp_path, monkeypatch, capsys
):
    config = ConvertConfig(model=str(model), output=tmp_path / "out", init_strategy="random")
    convert.run(config, Workspace(tmp_path / "w"))
    other = config.model_copy(update={"seed": 1})
    with monkeypatch.context() as patch:
        patch.setattr(convert_plan, "_free_memory", lambda: 2**20)
        with pytest.raises(ResourceError):
            convert.run(other, Workspace(tmp_path / "w"), force=True)
    capsys.readouterr()
    convert.run(config, Workspace(tmp_path / "w"))
    assert capsys.readouterr().out == ""  # up to date: nothing was written again
