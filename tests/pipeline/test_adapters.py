"""Adapters in place of models: in ``convert`` both ways, in ``validate``, and in the cache."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pydantic import ValidationError

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.config.train import TrainConfig
from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.model.gpt_oss.adapter import write_adapter
from nexus_cli.core.model.gpt_oss.export import nexus_tensors, write_model_directory
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import model_dir
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert, train, validate
from nexus_cli.pipeline.adapters import model_or_adapter


@pytest.fixture(scope="module")
def whole(tiny_converted_dir, tmp_path_factory):
    """A converted model whose gates are open, as training leaves it."""
    tensors = {
        name: torch.full_like(value, 4.0) if name.endswith("output_gate") else value
        for name, value in nexus_tensors(tiny_converted_dir).items()
    }
    target = tmp_path_factory.mktemp("whole") / "model"
    write_model_directory(target, tiny_converted_dir, tensors)
    return target


@pytest.fixture
def adapter(whole, tmp_path):
    write_adapter(tmp_path / "adapter", whole)
    return tmp_path / "adapter"


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "workspace")


def move_base(adapter, path):
    """Let the adapter name another place, as if it came from another machine."""
    (adapter / "local_base.json").write_text(json.dumps({"path": str(path)}))


def cached(workspace):
    folder = workspace.root / "cache" / "adapters"
    return [p for p in folder.iterdir() if p.is_dir()] if folder.exists() else []


def test_convert_makes_an_adapter_and_the_same_model_of_it_again(whole, workspace, tmp_path):
    small, again = tmp_path / "small", tmp_path / "again"
    for _ in range(2):  # the second time both are up to date
        convert.run(ConvertConfig(model=str(whole), adapter=True, output=small), workspace)
        convert.run(ConvertConfig(model=str(small), output=again), workspace)
    assert sorted(path.name for path in small.iterdir()) == [
        "adapter.safetensors",
        "local_base.json",
        "nexus_adapter.json",
    ]
    assert model_dir.fingerprint(again) == model_dir.fingerprint(whole)
    assert (tmp_path / "small.manifest.json").is_file()
    convert.run(ConvertConfig(model=str(small), copy_shards=True), workspace)
    inside = workspace.stage_dir("convert") / "model"
    assert model_dir.fingerprint(inside) == model_dir.fingerprint(whole)
    assert all(path.stat().st_nlink == 1 for path in inside.glob("model-*.safetensors"))
    assert not cached(workspace)


def test_a_dry_run_of_convert_says_what_and_writes_nothing(
    whole, adapter, workspace, tmp_path, capsys
):
    out = tmp_path / "out"
    convert.run(ConvertConfig(model=str(adapter), output=out), workspace, dry_run=True)
    convert.run(ConvertConfig(model=str(whole), adapter=True, output=out), workspace, dry_run=True)
    said = capsys.readouterr().out
    assert "put" in said
    assert "make an adapter of" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_strategy": "random"}, "init_strategy would have no effect"),
        ({"start": "gate", "seed": 1}, "start, seed would have no effect"),
    ],
)
def test_settings_of_a_new_shared_expert_are_no_settings_of_an_adapter_s(
    adapter, workspace, tmp_path, settings, words
):
    config = {"output": tmp_path / "out", **settings}
    with pytest.raises(ConfigError, match=words):
        convert.run(ConvertConfig(model=str(adapter), **config), workspace)
    with pytest.raises(ValidationError, match=words):
        ConvertConfig(adapter=True, **config)
    assert not (tmp_path / "out").exists()


def test_an_adapter_needs_an_output_and_a_converted_model(
    adapter, tiny_model_dir, workspace, tmp_path
):
    with pytest.raises(ValidationError, match="--output"):
        ConvertConfig(adapter=True)
    for model, words in ((tiny_model_dir, "no shared expert"), (adapter, "adapter already")):
        config = ConvertConfig(model=str(model), adapter=True, output=tmp_path / "out")
        with pytest.raises(ConfigError, match=words):
            convert.run(config, workspace)
        with pytest.raises(ConfigError, match=words):
            convert.run(config, workspace, dry_run=True)
    assert not (tmp_path / "out").exists()


def test_a_base_elsewhere_is_asked_for_and_taken_by_name(
    adapter, tiny_model_dir, workspace, tmp_path
):
    move_base(adapter, tmp_path / "gone")
    config = ConvertConfig(model=str(adapter), output=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"the base of .* is not at .*gone") as caught:
        convert.run(config, workspace)
    assert "--base" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    here = tmp_path / "here"
    shutil.copytree(tiny_model_dir, here)
    convert.run(config.model_copy(update={"base": str(here)}), workspace)
    named = json.loads((tmp_path / "out" / "conversion_metadata.json").read_text())["base"]
    assert (named["path"], named["name"]) == (str(here), "here")
    assert named["fingerprint"] == model_dir.fingerprint(tiny_model_dir)
    shutil.rmtree(here)
    # Where the base is makes no other model: the finished stage is current from another place.
    convert.run(config.model_copy(update={"base": str(tiny_model_dir)}), workspace)


def test_a_damaged_note_of_the_base_s_place_matters_only_where_no_base_is_given(
    adapter, tiny_model_dir, workspace, tmp_path
):
    (adapter / "local_base.json").write_text("{")
    config = ConvertConfig(model=str(adapter), output=tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"local_base\.json is not valid JSON") as caught:
        convert.run(config, workspace)
    assert str(caught.value.hint) == "delete it, or give the base's folder with --base"
    assert not (tmp_path / "out").exists()
    convert.run(config.model_copy(update={"base": str(tiny_model_dir)}), workspace)
    assert model_dir.is_model(tmp_path / "out")


def test_another_base_is_refused_everywhere_and_nothing_is_written(
    adapter, make_tiny_model, workspace, tmp_path
):
    other = str(make_tiny_model(tmp_path / "other", seed=5))
    before = sorted(tmp_path.iterdir())
    model, out = str(adapter), tmp_path / "out"
    for start in (
        lambda: convert.run(ConvertConfig(model=model, base=other, output=out), workspace),
        lambda: validate.run(ValidateConfig(checkpoint=model, base=other), workspace),
        lambda: train.run_online(TrainConfig(student=model, base=other, output=out), workspace),
    ):
        with pytest.raises(ArtifactError, match="is not the model that"):
            start()
    assert sorted(tmp_path.iterdir()) == before


def test_a_base_without_an_adapter_is_refused(whole, tiny_model_dir, workspace, tmp_path):
    model, base = str(whole), str(tiny_model_dir)
    for start in (
        lambda: convert.run(ConvertConfig(model=model, base=base), workspace),
        lambda: validate.run(ValidateConfig(checkpoint=model, base=base), workspace),
        lambda: train.run_online(TrainConfig(student=model, base=base), workspace),
    ):
        with pytest.raises(ConfigError, match="no adapter is given"):
            start()
    assert not list(tmp_path.iterdir())


def test_the_cache_holds_a_model_once_and_mends_it(adapter, whole, workspace, caplog):
    with caplog.at_level(logging.INFO, "nexus_cli"):
        found = model_or_adapter(adapter, workspace, None)
    assert found.digest == model_dir.fingerprint(whole)
    assert str(adapter) in caplog.text
    first = found.path.stat().st_ino
    assert model_or_adapter(adapter, workspace, None) == found
    assert found.path.stat().st_ino == first
    (found.path / "nexus-trained.safetensors").unlink()
    assert model_or_adapter(adapter, workspace, None) == found
    assert cached(workspace) == [found.path]


def test_ranks_that_ask_at_the_same_time_share_one_model(adapter, whole, workspace):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: model_or_adapter(adapter, workspace, None), range(8)))
    assert {artifact.digest for artifact in found} == {model_dir.fingerprint(whole)}
    assert cached(workspace) == [found[0].path]


def test_a_damaged_adapter_is_refused_even_where_its_model_is_in_the_cache(adapter, workspace):
    model_or_adapter(adapter, workspace, None)
    file = adapter / "adapter.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="is not the file whose sha256"):
        model_or_adapter(adapter, workspace, None)


def test_validate_reports_of_an_adapter_what_it_reports_of_the_model(
    adapter, whole, tiny_model_dir, tmp_path
):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"The {n} brown foxes. " * 9}) for n in range(4)))
    reports = []
    for name, model in (("whole", whole), ("adapter", adapter)):
        workspace = Workspace(tmp_path / name)
        config = ValidateConfig(
            checkpoint=str(model),
            domain=f"{text}@all",
            general=f"{text}@all",
            window=64,
            stride=32,
            dtype="float32",
            runtime={"device": "cpu"},
        )
        validate.run(config, workspace)
        reports.append(json.loads((workspace.stage_dir("validate") / "report.json").read_text()))
    mine, theirs = reports
    for part in ("checks", "sets", "summary", "baseline"):
        assert mine[part] == theirs[part], part
    assert mine["model"]["fingerprint"] == theirs["model"]["fingerprint"]
    assert theirs["baseline"]["path"] == str(tiny_model_dir)
    assert theirs["sets"]["general"]["kl"] > 0


def test_two_adapters_are_compared_with_each_other(adapter, tiny_converted_dir, tmp_path):
    write_adapter(tmp_path / "closed", tiny_converted_dir)
    config = ValidateConfig(
        checkpoint=str(adapter),
        baseline=str(tmp_path / "closed"),
        compute_perplexity=False,
        runtime={"device": "cpu"},
    )
    workspace = Workspace(tmp_path / "w")
    validate.run(config, workspace)
    report = json.loads((workspace.stage_dir("validate") / "report.json").read_text())
    assert report["baseline"]["kind"] == "named"
    assert len(cached(workspace)) == 2


def test_commands_that_read_the_original_alone_name_the_way_from_an_adapter(adapter):
    with pytest.raises(ConfigError, match="is an adapter, not a whole model") as caught:
        model_dir.resolve_model(adapter)
    assert f"nexus convert --input {adapter}" in str(caught.value.hint)
