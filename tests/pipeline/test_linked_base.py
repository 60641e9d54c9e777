"""A converted folder of links whose base moved or changed since, and folders that are as before."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.config.train import TrainConfig
from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.model.gpt_oss import export
from nexus_cli.core.model.gpt_oss.export import write_model_directory
from nexus_cli.errors import ArtifactError, WorkspaceError
from nexus_cli.io import model_dir
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert, validate
from nexus_cli.pipeline.adapters import model_or_adapter
from nexus_cli.pipeline.inputs import model_input, stage_input
from nexus_cli.pipeline.training.request import online_request

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def base(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def make(base, tmp_path, workspace):
    """Convert the base; returns the model's folder."""

    def make(**settings):
        settings = {"init_strategy": "random", "output": tmp_path / "model"} | settings
        convert.run(ConvertConfig(model=str(base), **settings), workspace)
        return settings["output"]

    return make


@pytest.fixture
def symbolic(monkeypatch):
    """A disk that refuses hard links."""

    def refuse(*_):
        raise OSError("not here")

    monkeypatch.setattr(export.os, "link", refuse)


def rewrite(shard):
    """Other bytes in the same file, as an editor in place leaves them."""
    with shard.open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"0123456789")


def replace(shard):
    """Other bytes in a new file of the same name, as a download leaves them."""
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content)
    rewrite(shard)


def readers(model, workspace):
    """Every command that reads a converted model, up to where it has found it."""
    yield lambda: validate.run(ValidateConfig(checkpoint=str(model)), workspace)
    yield lambda: online_request(TrainConfig(student=str(model)), workspace, 1)
    yield lambda: convert.run(ConvertConfig(model=str(model), num_shared_experts=0), workspace)


@pytest.mark.usefixtures("symbolic")
def test_a_base_that_moved_is_named_with_the_way_out(make, base, workspace, tmp_path):
    model = make()
    base.rename(tmp_path / "elsewhere")
    for read in readers(model, workspace):
        with pytest.raises(ArtifactError, match=f"the base of {model} has moved") as caught:
            read()
        assert str(base / "model-0000") in str(caught.value)
        assert f"nexus convert --adapter --input {model}" in str(caught.value.hint)


@pytest.mark.usefixtures("symbolic")
def test_a_base_that_moved_is_named_for_the_model_of_a_workspace(make, base, workspace, tmp_path):
    make(output=None)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="has moved"):
        stage_input(workspace, "convert", None)


@pytest.mark.parametrize("linked", ["hard", "symbolic"])
def test_a_base_that_was_rewritten_in_place_is_refused(make, base, workspace, request, linked):
    if linked == "symbolic":
        request.getfixturevalue("symbolic")
    model = make()
    rewrite(base / SHARD)
    for read in readers(model, workspace):
        with pytest.raises(ArtifactError, match=f"the base of {model} has changed") as caught:
            read()
        assert f"{SHARD}, which was of {base}" in str(caught.value)
        assert "put the original's bytes back" in str(caught.value.hint)


@pytest.mark.usefixtures("symbolic")
def test_a_base_that_was_replaced_is_refused_where_the_links_follow_the_name(make, base):
    model = make()
    replace(base / SHARD)
    with pytest.raises(ArtifactError, match=f"the base of {model} has changed"):
        model_input(model)


def test_a_base_that_was_replaced_is_told_where_hard_links_keep_it(make, base, caplog):
    model = make()
    before = model_input(model)
    assert "was replaced" not in caplog.text
    replace(base / SHARD)
    with caplog.at_level(logging.WARNING, "nexus_cli"):
        assert model_input(model) == before
    assert f"the base {base} was replaced since {model} was converted" in caplog.text


def test_a_base_that_was_copied_back_is_as_it_was(make, base, caplog):
    model = make()
    content = (base / SHARD).read_bytes()
    (base / SHARD).unlink()
    (base / SHARD).write_bytes(content)
    model_input(model)
    assert "was replaced" not in caplog.text


def test_a_changed_base_makes_no_stage_stale_and_names_no_other_stage(make, base, workspace):
    make(output=None)
    rewrite(base / SHARD)
    with pytest.raises(ArtifactError, match="has changed since it was converted"):
        stage_input(workspace, "convert", None)


def test_a_stage_that_lost_a_file_of_its_own_is_told_as_before(make, workspace):
    make(output=None)
    (workspace.stage_dir("convert") / "model" / "nexus-trained.safetensors").unlink()
    with pytest.raises(WorkspaceError, match="lost some of its files"):
        stage_input(workspace, "convert", None)


def test_copies_do_not_follow_the_base(make, base):
    model = make(copy_shards=True)
    before = model_input(model)
    rewrite(base / SHARD)
    assert model_input(model) == before


@pytest.mark.parametrize(
    "settings", [{"copy_shards": True}, {"num_shared_experts": 0}, {}], ids=str
)
def test_what_did_not_change_passes(make, settings):
    model_input(make(**settings))


def test_a_lone_shard_is_known_by_its_new_name(make, base):
    from safetensors.torch import load_file, save_file

    tensors = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}
    for file in (*base.glob("*.safetensors"), base / model_dir.INDEX):
        file.unlink()
    save_file(tensors, base / model_dir.SINGLE, metadata={"format": "pt"})
    model = make()
    model_input(model)
    rewrite(base / model_dir.SINGLE)
    with pytest.raises(ArtifactError, match="has changed"):
        model_input(model)


def test_a_checkpoint_with_a_trained_router_passes_and_is_refused_as_its_student_is(
    make, base, tmp_path
):
    from safetensors.torch import load_file

    routers = {
        name: tensor + 1
        for file in base.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".router." in name
    }
    write_model_directory(tmp_path / "checkpoint-1", make(), routers)
    model_input(tmp_path / "checkpoint-1")
    rewrite(base / SHARD)
    with pytest.raises(ArtifactError, match=r"the base of .*checkpoint-1 has changed"):
        model_input(tmp_path / "checkpoint-1")


def test_a_folder_of_an_earlier_version_records_no_shards_and_is_read(make, base):
    model = make()
    file = model / "conversion_metadata.json"
    record = json.loads(file.read_text())
    record["base"] = {name: record["base"][name] for name in ("path", "fingerprint")}
    file.write_text(json.dumps(record))
    rewrite(base / SHARD)
    model_input(model)


@pytest.mark.usefixtures("symbolic")
@pytest.mark.parametrize("harm", ["moved", "changed"])
def test_what_was_trained_is_saved_as_an_adapter_and_put_on_a_good_base(
    make, base, tiny_model_dir, workspace, tmp_path, caplog, harm
):
    model = make()
    before = model_dir.fingerprint(model)
    if harm == "moved":
        base.rename(tmp_path / "elsewhere")
    else:
        rewrite(base / SHARD)
    small, again = tmp_path / "small", tmp_path / "again"
    with caplog.at_level(logging.WARNING, "nexus_cli"):
        convert.run(ConvertConfig(model=str(model), adapter=True, output=small), workspace)
    assert f"the base of {model} has {harm}" in caplog.text
    convert.run(ConvertConfig(model=str(small), base=str(tiny_model_dir), output=again), workspace)
    assert model_dir.fingerprint(again) == before


def test_an_adapter_s_cached_model_is_made_again_where_its_links_changed(
    make, base, workspace, tmp_path
):
    small = tmp_path / "small"
    convert.run(ConvertConfig(model=str(make()), adapter=True, output=small), workspace)
    found = model_or_adapter(small, workspace, None)
    content = (base / SHARD).read_bytes()
    rewrite(base / SHARD)
    (base / SHARD).unlink()
    (base / SHARD).write_bytes(content)  # downloaded again; the cache links what was spoilt
    assert model_or_adapter(small, workspace, None) == found
