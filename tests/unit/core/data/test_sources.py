import shutil
from pathlib import Path

import pytest

from nexus_cli.core.data.errors import MissingTextError, UnknownSourceError
from nexus_cli.core.data.files import read_rows
from nexus_cli.core.data.nemotron import LAYOUTS, OWNER
from nexus_cli.core.data.sources import HubText, LocalText, resolve_source

FIXTURES = Path(__file__).parents[3] / "fixtures/nemotron"
COPIES = [
    ("nemotron-general", "Nemotron-Post-Training-Dataset-v1", 1),
    ("nemotron-code", "Nemotron-Post-Training-Dataset-v1", 1),
    ("nemotron-math", "Nemotron-Post-Training-Dataset-v1", 1),
    ("nemotron-tool-calling", "Nemotron-Post-Training-Dataset-v1", 1),
    ("nemotron-general", "Nemotron-Post-Training-Dataset-v2", 1),
    ("nemotron-code", "Nemotron-Post-Training-Dataset-v2", 1),
    ("nemotron-math", "Nemotron-Post-Training-Dataset-v2", 1),
    ("nemotron-general", "Llama-Nemotron-Post-Training-Dataset", 1),
    ("nemotron-code", "Llama-Nemotron-Post-Training-Dataset", 1),
    ("nemotron-math", "Llama-Nemotron-Post-Training-Dataset", 1),
    ("nemotron-math", "Nemotron-Math-v2", 3),
    ("nemotron-tool-calling", "Nemotron-Agentic-v1", 2),
    ("nemotron-general", "Nemotron-SFT-Instruction-Following-Chat-v3", 1),
]


@pytest.mark.parametrize(("name", "repository", "num_files"), COPIES)
@pytest.mark.parametrize("place", ["owner", "bare", "itself", "hub cache"])
def test_a_clone_is_found_wherever_users_put_it(tmp_path, name, repository, num_files, place):
    target = {
        "owner": tmp_path / OWNER / repository,
        "bare": tmp_path / repository,
        "itself": tmp_path / repository,
        "hub cache": tmp_path / f"datasets--{OWNER}--{repository}" / "snapshots" / "0123",
    }[place]
    shutil.copytree(FIXTURES / OWNER / repository, target)
    text = resolve_source(name, "train", target if place == "itself" else tmp_path)
    assert isinstance(text, LocalText)
    assert text.origin == str(target)
    assert len(text.files) == num_files
    assert all(row for path in text.files for row in read_rows(path))


@pytest.mark.parametrize("name", LAYOUTS)
def test_of_several_copies_the_first_version_is_taken_alone(name):
    text = resolve_source(name, "train", FIXTURES)
    assert text.origin.endswith("Nemotron-Post-Training-Dataset-v1")


def test_a_folder_under_a_short_name_is_found(tmp_path):
    (tmp_path / "tool").mkdir()
    shutil.copy(
        FIXTURES / OWNER / "Nemotron-Agentic-v1/data/tool_calling.jsonl", tmp_path / "tool/a.jsonl"
    )
    text = resolve_source("nemotron-tool-calling", "train", tmp_path)
    assert text.files == (tmp_path / "tool/a.jsonl",)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_folder_without_the_set_is_an_error_and_not_another_set(tmp_path, name):
    with pytest.raises(MissingTextError) as caught:
        resolve_source(name, "train", tmp_path)
    assert name in str(caught.value)
    assert "--data" in caught.value.hint
    assert "--data-dir" in caught.value.hint
    with pytest.raises(MissingTextError, match="is not there"):
        resolve_source(name, "train", tmp_path / "nowhere")


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_a_data_folder_the_open_version_is_streamed(name):
    text = resolve_source(name, "train", None)
    assert isinstance(text, HubText)
    assert text.repository == "nvidia/Nemotron-Post-Training-Dataset-v1"


def test_a_hub_id_may_name_a_configuration_and_a_split():
    assert resolve_source("allenai/c4:en:validation", "train", None) == HubText(
        "allenai/c4", "en", "validation"
    )
    assert resolve_source("org/name", "all", None) == HubText("org/name", None, "train")


def test_a_path_is_taken_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/name").mkdir()
    Path("org/name/a.jsonl").write_text('{"text": "x"}\n')
    assert resolve_source("org/name", "train", None).files == (Path("org/name/a.jsonl"),)


@pytest.mark.parametrize(
    "name", ["nemotron", "no such file", "data/missing.jsonl", "/a/b/c", "a:b"]
)
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(UnknownSourceError) as caught:
        resolve_source(name, "train", None)
    assert name in str(caught.value)
    assert "bundled-general" in caught.value.hint


@pytest.mark.parametrize("name", ["bundled-general", "bundled-tool-calling"])
def test_the_bundled_texts_come_already_split(name):
    train, held_out, both = (
        resolve_source(name, split, None) for split in ("train", "held-out", "all")
    )
    assert train.is_split
    assert both.files == train.files + held_out.files
    assert not set(train.files) & set(held_out.files)
