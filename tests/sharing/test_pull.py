"""``hf://owner/name`` in place of an adapter's folder: pulled, verified, and put on its base."""

from __future__ import annotations

import json
import shutil

import pytest

from nexus_cli.config.train import TrainConfig
from nexus_cli.config.validate import ValidateConfig
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError
from nexus_cli.io import hub as client
from nexus_cli.io import model_dir
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import validate_models
from nexus_cli.pipeline.training.request import online_request

# The client passes files to its HTTP library in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PULLED = "hf://tester/small"


@pytest.mark.usefixtures("pushed")
def test_a_pulled_adapter_finds_its_base_in_the_cache_of_the_hub(
    adapter, machine, convert, tmp_path
):
    convert(adapter, output=tmp_path / "here")
    shutil.rmtree(adapter)
    convert(PULLED, output=tmp_path / "there")
    here, there = (model_dir.fingerprint(tmp_path / name) for name in ("here", "there"))
    assert here == there
    named = json.loads((tmp_path / "there" / "conversion_metadata.json").read_text())["base"]
    assert named["path"] == str(machine.base)


@pytest.mark.usefixtures("pushed")
def test_train_and_validate_take_it_where_they_take_a_model(tmp_path):
    workspace = Workspace(tmp_path / "w")
    choice = validate_models.choose(ValidateConfig(checkpoint=PULLED), workspace)
    assert choice.kind == "base"
    request = online_request(TrainConfig(student=f"{PULLED}@main"), workspace, 1)
    assert request.student == choice.model
    assert request.shape.num_shared_experts == 1


@pytest.mark.usefixtures("pushed")
def test_a_base_elsewhere_is_given_by_name(log_in, machine, convert, tmp_path):
    log_in(tmp_path / "home")
    shutil.copytree(machine.base, tmp_path / "base")
    convert(PULLED, base=str(tmp_path / "base"), output=tmp_path / "out")
    assert model_dir.is_model(tmp_path / "out")


@pytest.mark.usefixtures("pushed")
def test_another_base_is_refused_and_nothing_is_written(log_in, make_tiny_model, convert, tmp_path):
    log_in(tmp_path / "home")
    other = make_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(ArtifactError, match=f"other is not the model that {PULLED}") as caught:
        convert(PULLED, base=str(other), output=tmp_path / "out")
    assert "acme/tiny at revision" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("pushed")
def test_a_model_of_the_base_s_name_but_of_other_bytes_is_not_taken(
    log_in, machine, make_tiny_model, convert, tmp_path
):
    home = tmp_path / "home"
    log_in(home)
    make_tiny_model(home / machine.base.relative_to(machine.home), seed=5)
    with pytest.raises(ConfigError, match=f"the base of {PULLED}, acme/tiny, is not") as caught:
        convert(PULLED, output=tmp_path / "out")
    wanted = f"run: hf download acme/tiny --revision {machine.base.name}; or"
    assert str(caught.value.hint).startswith(wanted)
    assert not (tmp_path / "out").exists()


def test_a_base_is_never_downloaded(hub, pushed, log_in, convert, tmp_path):
    hub.repos["acme/tiny"] = type(pushed)(private=False, commits=[{"config.json": b"{}"}])
    log_in(tmp_path / "home")
    with pytest.raises(ConfigError, match="is not on this machine"):
        convert(PULLED, output=tmp_path / "out")
    assert not [asked for asked in hub.asked if "acme/tiny" in asked]


def test_an_earlier_commit_is_read_by_its_name(pushed, convert, tmp_path):
    pushed.commits.append({"README.md": b"emptied"})
    with pytest.raises(ArtifactError, match="is not an adapter"):
        convert(PULLED, output=tmp_path / "now")
    convert(f"{PULLED}@{pushed.commit_name(1)}", output=tmp_path / "then")
    assert model_dir.is_model(tmp_path / "then")


@pytest.mark.usefixtures("pushed")
def test_what_is_in_the_cache_is_read_offline(log_in, machine, convert, tmp_path):
    convert(PULLED, output=tmp_path / "one")
    log_in(machine.home, HF_HUB_OFFLINE=True)
    convert(PULLED, output=tmp_path / "two")
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE is set"):
        convert("hf://tester/never-seen", output=tmp_path / "three")


def test_a_file_that_was_changed_on_the_hub_is_refused(pushed, convert, tmp_path):
    content = pushed.files["adapter.safetensors"]
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    pushed.commits.append(pushed.files | {"adapter.safetensors": flipped})
    with pytest.raises(ArtifactError, match="is not the file whose sha256") as caught:
        convert(PULLED, output=tmp_path / "out")
    assert "run: hf download tester/small --revision" in str(caught.value.hint)


def test_a_repository_that_is_no_adapter_says_so_and_no_file_of_it_is_read(
    hub, pushed, convert, tmp_path
):
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "code.py": b"raise"}
    hub.repos["acme/whole"] = type(pushed)(private=False, commits=[files])
    with pytest.raises(ArtifactError, match=r"is not an adapter: it has no nexus_adapter\.json"):
        convert("hf://acme/whole", output=tmp_path / "out")
    assert not [asked for asked in hub.asked if asked.endswith(tuple(files))]


def test_of_a_repository_only_the_files_of_an_adapter_are_read(pushed, hub, convert, tmp_path):
    more = ["LICENSE.md", "NOTICE.txt", "USAGE_POLICY"]
    foreign = [
        "LICENSE-code/evil.py",
        "LICENSE/evil.py",
        "NOTICE_x/huge.bin",
        "USAGE_POLICY.py",
        "local_base.json",
        "sub/README.md",
        "sub/adapter.safetensors",
    ]
    pushed.commits.append(
        {name: content for name, content in pushed.files.items() if name != "LICENSE"}
        | dict.fromkeys(more + foreign, b"{}")
    )
    hub.asked.clear()
    convert(PULLED, output=tmp_path / "out")
    read = {asked.partition(f"/{pushed.commit_name(2)}/")[2] for asked in hub.asked} - {""}
    assert read == {"README.md", "adapter.safetensors", "nexus_adapter.json", *more}


@pytest.mark.parametrize(
    ("uri", "token", "kind", "words"),
    [
        ("hf://tester/none", "may-read", ArtifactError, "the hub has no tester/none, or hides it"),
        ("hf://tester/small", "stale", ArtifactError, "the hub has no tester/small, or hides it"),
        ("hf://tester/small@v9", "may-read", ArtifactError, "there is no such revision"),
    ],
)
@pytest.mark.usefixtures("pushed")
def test_what_cannot_be_pulled_says_why(log_in, convert, tmp_path, uri, token, kind, words):
    log_in(tmp_path / "home", token)
    with pytest.raises(kind, match=words) as caught:
        convert(uri, output=tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_is_told(log_in, adapter, convert, tmp_path):
    nobody = "http://127.0.0.1:9"
    template = nobody + "/{repo_id}/resolve/{revision}/{filename}"
    log_in(tmp_path / "home", ENDPOINT=nobody, HUGGINGFACE_CO_URL_TEMPLATE=template)
    for model, settings in (
        ("hf://tester/small", {"output": tmp_path / "out"}),
        (adapter, {"adapter": True, "push_to_hub": "tester/small"}),
    ):
        with pytest.raises(ResourceError, match="the hub does not answer") as caught:
            convert(model, **settings)
        assert "check the network" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("uri", "name", "revision"),
    [
        ("hf://o/n", "o/n", None),
        ("HF://o/n/", "o/n", None),
        ("hf://o/n@v1.0", "o/n", "v1.0"),
        ("hf://o/n@refs%2Fpr%2F1", "o/n", "refs/pr/1"),
    ],
)
def test_a_repository_is_spelled_with_its_owner_and_perhaps_a_revision(uri, name, revision):
    assert client.parse_repository(uri) == client.Repository(name, revision)


@pytest.mark.parametrize(
    "uri",
    [
        "hf://o",
        "hf:/o/n",
        "hf://datasets/o/n",
        "hf://o/n/sub",
        "hf://o/n@",
        "hf://o/n@a b",
        "hf://o/n@../../x",
        "hf://o/n@a/..",
        "hf://o/n@%2E%2E/x",
        "hf://o/n@/etc/x",
        "hf://o/n@a//b",
    ],
)
def test_other_spellings_are_refused_with_the_right_one(uri):
    assert client.is_uri(uri)
    with pytest.raises(ConfigError) as caught:
        client.parse_repository(uri)
    assert "hf://OWNER/NAME" in str(caught.value.hint)


def test_a_whole_model_is_not_read_from_the_hub():
    with pytest.raises(ConfigError) as caught:
        model_dir.resolve_model("hf://openai/gpt-oss-20b")
    assert "hf download openai/gpt-oss-20b" in str(caught.value.hint)
