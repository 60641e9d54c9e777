"""``convert --adapter --push-to-hub``: what goes up, to whom it is shown, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest
import yaml
from pydantic import ValidationError

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError

# The client passes files to its HTTP library in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {"LICENSE", "README.md", "adapter.safetensors", "nexus_adapter.json"}


def test_a_model_is_pushed_as_an_adapter_in_one_commit_and_in_private(
    hub, log_in, machine, convert, tmp_path, capsys
):
    log_in(machine.home)
    out = tmp_path / "small"
    convert(machine.model, adapter=True, output=out, push_to_hub="tester/small")
    repo = hub.repos["tester/small"]
    assert repo.private
    assert repo.files.keys() == FILES
    assert repo.files["adapter.safetensors"] == (out / "adapter.safetensors").read_bytes()
    assert len(repo.commits) == 2  # empty, and all of it at once
    said = capsys.readouterr().out
    assert said.endswith("tester/small (private): to be read as hf://tester/small\n")


def test_an_adapter_that_is_up_to_date_is_pushed_all_the_same(
    hub, log_in, machine, convert, tmp_path
):
    log_in(machine.home)
    out = tmp_path / "small"
    convert(machine.model, adapter=True, output=out)
    before = (out / "nexus_adapter.json").stat().st_mtime_ns
    convert(machine.model, adapter=True, output=out, push_to_hub="tester/small")
    assert hub.repos["tester/small"].files.keys() == FILES
    assert (out / "nexus_adapter.json").stat().st_mtime_ns == before


def test_nothing_that_is_pushed_names_a_place_of_this_machine(pushed, machine, adapter, tmp_path):
    for name, content in pushed.files.items():
        assert str(machine.root).encode() not in content, name
        assert str(tmp_path).encode() not in content, name
    base = json.loads(pushed.files["nexus_adapter.json"])["base"]
    assert (base["name"], base["revision"]) == ("acme/tiny", machine.base.name)
    assert str(machine.base) in (adapter / "local_base.json").read_text()


def test_the_training_state_beside_an_adapter_stays_at_home(hub, log_in, machine, adapter, convert):
    (adapter / "training_state").mkdir()
    (adapter / "training_state" / "masters.safetensors").write_bytes(b"mine")
    (adapter / "notes.txt").write_text("mine")
    log_in(machine.home)
    convert(adapter, adapter=True, push_to_hub="tester/small")
    assert hub.repos["tester/small"].files.keys() == FILES


def test_licences_go_up_by_their_usual_names_and_others_are_told(
    hub, log_in, machine, adapter, convert, caplog
):
    for name in ("NOTICE.txt", "USAGE_POLICY.md", "LICENSE.py", "LICENSE-2"):
        (adapter / name).write_text("as you like")
    (adapter / "LICENSE-code").mkdir()
    (adapter / "LICENSE-code" / "evil.py").write_text("raise")
    log_in(machine.home)
    convert(adapter, adapter=True, push_to_hub="tester/small")
    assert hub.repos["tester/small"].files.keys() == FILES | {"NOTICE.txt", "USAGE_POLICY.md"}
    assert "LICENSE-2 is not pushed" in caplog.text


def test_an_adapter_of_the_first_format_is_pushed_in_the_present_one(
    hub, log_in, machine, adapter, convert
):
    file = adapter / "nexus_adapter.json"
    config = json.loads(file.read_text())
    old = {"path": str(machine.base), "fingerprint": config["base"]["fingerprint"]}
    config |= {"format": "nexus.adapter/1", "base": old}
    config["conversion"] |= {
        "base": old,
        "router_statistics": {"path": str(machine.root / "stats.json")},
    }
    file.write_text(json.dumps(config))
    (adapter / "local_base.json").unlink()
    log_in(machine.home)
    convert(adapter, adapter=True, push_to_hub="tester/old")
    content = hub.repos["tester/old"].files["nexus_adapter.json"]
    assert str(machine.root).encode() not in content
    found = json.loads(content)
    assert found["format"] == "nexus.adapter/2"
    assert found["base"]["name"] == "acme/tiny"
    assert found["conversion"]["router_statistics"]["path"] == "stats.json"


def test_the_card_names_base_licence_and_command(pushed):
    _, front, body = pushed.files["README.md"].decode().split("---\n", 2)
    told = yaml.safe_load(front)
    assert (told["base_model"], told["base_model_relation"]) == ("acme/tiny", "adapter")
    assert told["license"] == "apache-2.0"
    assert told["library_name"] == "nexus"
    assert "nexus convert --input hf://tester/small" in body


def test_a_card_that_is_on_the_hub_is_not_written_over(pushed, adapter, convert):
    pushed.commits.append(pushed.files | {"README.md": b"by hand"})
    convert(adapter, adapter=True, push_to_hub="tester/small")
    assert len(pushed.commits) == 4
    assert pushed.files["README.md"] == b"by hand"


def test_a_card_in_the_folder_is_the_user_s(hub, log_in, machine, adapter, convert):
    (adapter / "README.md").write_text("# Mine\n")
    log_in(machine.home)
    convert(adapter, adapter=True, push_to_hub="tester/small")
    assert hub.repos["tester/small"].files["README.md"] == b"# Mine\n"


def test_a_public_repository_is_made_and_written_to_by_name_alone(
    hub, log_in, machine, adapter, convert
):
    log_in(machine.home)
    convert(adapter, adapter=True, push_to_hub="tester/open", public=True)
    repo = hub.repos["tester/open"]
    assert not repo.private
    with pytest.raises(ConfigError, match="tester/open is a public repository") as caught:
        convert(adapter, adapter=True, push_to_hub="tester/open")
    assert "--public" in str(caught.value.hint)
    assert len(repo.commits) == 2


@pytest.mark.parametrize(
    ("token", "owner", "words"),
    [
        ("", "tester", "there is no token of the hub on this machine"),
        ("stale", "tester", "the hub refuses the token"),
        ("may-read", "tester", "the token may not do that with the repositories of tester"),
        ("may-write", "others", "the token may not do that with the repositories of others"),
    ],
)
def test_a_push_that_the_hub_refuses_says_why(
    hub, log_in, adapter, convert, tmp_path, token, owner, words
):
    log_in(tmp_path / "home", token)
    with pytest.raises(ResourceError, match=words) as caught:
        convert(adapter, adapter=True, push_to_hub=f"{owner}/small")
    assert caught.value.hint
    assert not hub.repos


def test_whoever_cannot_push_is_told_before_anything_is_written(
    log_in, machine, convert, tmp_path, monkeypatch
):
    out = tmp_path / "small"
    settings = {"adapter": True, "output": out, "push_to_hub": "tester/small"}
    log_in(tmp_path / "home", HF_HUB_OFFLINE=True)
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE is set"):
        convert(machine.model, **settings)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ResourceError, match="needs the package huggingface_hub") as caught:
        convert(machine.model, **settings)
    assert 'pip install "nexus-cli[hub]"' in str(caught.value.hint)
    assert not out.exists()


def test_a_damaged_adapter_is_not_pushed(hub, log_in, machine, adapter, convert):
    file = adapter / "adapter.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    log_in(machine.home)
    with pytest.raises(ArtifactError, match="is not the file whose sha256"):
        convert(adapter, adapter=True, push_to_hub="tester/small")
    assert not hub.asked


def test_a_dry_run_says_where_to_and_asks_nobody(hub, log_in, machine, adapter, convert, capsys):
    log_in(machine.home)
    convert(adapter, adapter=True, push_to_hub="tester/small", dry_run=True)
    assert "tester/small (private, if it is new)" in capsys.readouterr().out
    assert not hub.asked


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"push_to_hub": "a/b"}, "give --adapter too"),
        ({"adapter": True, "push_to_hub": "small"}, "takes OWNER/NAME"),
        ({"adapter": True, "push_to_hub": "hf://a/b"}, "takes OWNER/NAME"),
        ({"adapter": True, "output": "x", "public": True}, "give --push-to-hub"),
    ],
)
def test_settings_that_make_no_push_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        ConvertConfig(**settings)


def test_a_model_needs_an_output_and_an_adapter_none(log_in, machine, adapter, convert, tmp_path):
    log_in(machine.home)
    with pytest.raises(ConfigError, match="--output"):
        convert(machine.model, adapter=True, push_to_hub="tester/small")
    with pytest.raises(ConfigError, match="is pushed as it is"):
        convert(adapter, adapter=True, output=tmp_path / "o", push_to_hub="tester/small")
