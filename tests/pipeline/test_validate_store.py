"""``nexus validate --precomputed-teacher``: a good store passes, and each defect is named."""

import json
import shutil

import pytest

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.config.validate import ValidateConfig
from nexus_cli.errors import ArtifactError, CheckFailed, ConfigError
from nexus_cli.io.location import locate
from nexus_cli.io.teacher_store.reader import open_store
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import precompute, validate
from nexus_cli.pipeline.validate import Mode


@pytest.fixture(scope="module")
def store(tiny_model_dir, tmp_path_factory):
    """A store with experts, of six sequences."""
    root = tmp_path_factory.mktemp("store")
    text = root / "text.jsonl"
    lines = (json.dumps({"text": f"one {i} two {i * i} three " * 12}) for i in range(20))
    text.write_text("\n".join(lines))
    config = PrecomputeConfig(
        model=str(tiny_model_dir),
        data={"sources": f"{text}@all", "seq_len": 48},
        num_steps=3,
        batch_size=2,
        top_k=6,
        experts=True,
        output=root / "store",
        runtime={"device": "cpu"},
    )
    precompute.run(config, Workspace(root / "w"))
    return root / "store"


def check(store, tmp_path, **settings):
    config = ValidateConfig(store=str(store), runtime={"device": "cpu"}, **settings)
    validate.run(config, Workspace(tmp_path), mode=Mode())
    return json.loads((tmp_path / "validate" / "store_report.json").read_text())


def test_a_good_store_passes_and_its_figures_are_those_of_the_manifest(store, tmp_path, capsys):
    report = check(store, tmp_path)
    manifest = open_store(locate(store)).manifest
    assert [check["passed"] for check in report["checks"]] == [True] * 4
    figures = report["figures"]
    assert figures["targets"] == manifest.num_targets
    assert figures["bytes_per_token"] == pytest.approx(manifest.num_bytes / (6 * 48))
    assert figures["entries"]["mean"] == pytest.approx(manifest.mean_k)
    assert figures["live"] == {
        "rows": 6,
        "targets": manifest.num_targets,
        "same_likeliest_token": 1.0,
        "routing_agreement": 1.0,
    }
    assert "bytes a token" in capsys.readouterr().out


def test_json_is_all_there_is_on_stdout(store, tmp_path, capsys):
    config = ValidateConfig(store=str(store), store_rows=0)
    validate.run(config, Workspace(tmp_path), mode=Mode(json=True))
    report = json.loads(capsys.readouterr().out)
    assert report["teacher"] is None
    assert "live" not in report["figures"]


def test_a_changed_shard_fails_the_check_and_the_report_is_written(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "copy")
    shard = copy / "shards" / "00001.parquet"
    data = bytearray(shard.read_bytes())
    data[60] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckFailed, match="hash is not the manifest's is 1"):
        check(copy, tmp_path)
    report = json.loads((tmp_path / "validate" / "store_report.json").read_text())
    assert report["checks"][0]["value"] == 1


def test_a_manifest_whose_nll_is_another_fails(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "copy")
    manifest = json.loads((copy / "store.json").read_text())
    for shard in manifest["shards"]:
        shard["nll_sum"] *= 1.1
    (copy / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckFailed, match="mean nll read less the one written"):
        check(copy, tmp_path)


def test_another_teacher_and_one_that_is_gone_are_refused(store, make_tiny_model, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(ArtifactError, match="is not the teacher that"):
        check(store, tmp_path, checkpoint=str(other))
    copy = shutil.copytree(store, tmp_path / "copy")
    manifest = json.loads((copy / "store.json").read_text())
    manifest["plan"]["teacher_name"] = "/nowhere/model"
    (copy / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="/nowhere/model is not there") as caught:
        check(copy, tmp_path)
    assert "--model" in caught.value.hint


def test_a_dry_run_reads_no_shard(store, tmp_path, capsys):
    config = ValidateConfig(store=str(store))
    validate.run(config, Workspace(tmp_path), dry_run=True)
    assert "bytes to read" in capsys.readouterr().out
    assert not (tmp_path / "validate").exists()


def test_a_store_does_not_talk(store, tmp_path):
    with pytest.raises(ConfigError, match="does not talk"):
        validate.run(ValidateConfig(store=str(store)), Workspace(tmp_path), mode=Mode(chat=True))
