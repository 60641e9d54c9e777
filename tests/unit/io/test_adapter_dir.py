"""What an adapter's folder says, in this format and the one before, and what it never says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nexus_cli import embedded
from nexus_cli.errors import ArtifactError
from nexus_cli.io import adapter_dir
from nexus_cli.io.base_identity import identity

BASE = "/srv/hub/models--openai--gpt-oss-20b/snapshots/6cee5e81"
FIRST = {
    "format": "nexus.adapter/1",
    "base": {"path": BASE, "fingerprint": "ab"},
    "shape": {
        "num_layers": 2,
        "num_experts": 8,
        "hidden_size": 64,
        "num_shared_experts": 1,
        "shared_intermediate_size": 32,
    },
    "tensors": {"sha256": "cd", "bytes": 3},
    "conversion": {
        "base": {"path": BASE, "fingerprint": "ab"},
        "router_statistics": {"path": "/home/me/runs/pca_stats.json", "tokens": 5},
    },
    "environment": {},
}


@pytest.fixture
def first(tmp_path):
    def write(**changes):
        (tmp_path / "nexus_adapter.json").write_text(json.dumps(FIRST | changes))
        return tmp_path

    return write


def test_the_first_format_is_read_as_the_present_one(first):
    folder = first()
    config = adapter_dir.read_config(folder)
    assert config.format == "nexus.adapter/2"
    assert config.base == identity(Path(BASE), "ab")
    assert (config.base.repository, config.base.revision) == ("openai/gpt-oss-20b", "6cee5e81")
    assert adapter_dir.read_local_base(folder) == Path(BASE)
    assert "/" not in config.model_dump_json().replace("nexus.adapter/2", "").replace(
        "openai/gpt-oss-20b", ""
    )


@pytest.mark.parametrize("base", [None, "x", {"path": "/a"}, {"path": "/a", "sha": "b"}])
def test_a_first_format_that_names_no_base_is_damaged(first, base):
    with pytest.raises(ArtifactError, match=r"not a nexus\.adapter/2 file"):
        adapter_dir.read_config(first(base=base))


@pytest.mark.parametrize(
    "named",
    [
        {"name": "o/n", "revision": "x; rm -r ~"},
        {"name": "o/n", "revision": "a/../../x"},
        {"name": "\x1b[2J", "revision": None},
        {"name": "\x9b2J", "revision": None},  # the same in one character
        {"name": "o/n", "revision": None, "fingerprint": "\x1b[2J"},
    ],
)
def test_a_name_that_would_harm_whoever_reads_or_types_it_is_refused(first, named):
    base = {"fingerprint": "ab"} | named
    with pytest.raises(ArtifactError, match="not a nexus"):
        adapter_dir.read_config(first(format="nexus.adapter/2", base=base))


@pytest.mark.parametrize(
    "size",
    [
        "num_layers",
        "num_experts",
        "hidden_size",
        "num_shared_experts",
        "shared_intermediate_size",
    ],
)
@pytest.mark.parametrize("value", [0, 10**9])
def test_a_size_that_no_model_has_is_refused(first, size, value):
    with pytest.raises(ArtifactError, match="not a nexus"):
        adapter_dir.read_config(first(shape=FIRST["shape"] | {size: value}))


@pytest.mark.parametrize(
    ("note", "words"), [("{}", "names no path"), ("{", "is not valid JSON"), ("[]", "no JSON obj")]
)
def test_a_damaged_note_of_the_base_s_place_is_named(first, note, words):
    folder = first()
    (folder / "local_base.json").write_text(note)
    with pytest.raises(ArtifactError, match=rf"local_base\.json .*{words}") as caught:
        adapter_dir.read_local_base(folder)
    assert "delete it" in str(caught.value.hint)
    assert "--base" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ({"path": "/home/me/a.json"}, {"path": "a.json"}),
        ({"path": "runs/x/a.json"}, {"path": "a.json"}),
        ({"path": "C:\\Users\\me\\a.json"}, {"path": "a.json"}),
        ({"a": [{"b": "/home/me"}]}, {"a": [{"b": "me"}]}),
        ({"a": "file:///home/me/x"}, {"a": "x"}),
        ({"tokens": 3, "word": "a/b", "none": None}, {"tokens": 3, "word": "a/b", "none": None}),
    ],
)
def test_places_leave_their_last_part(value, left):
    assert adapter_dir.without_places(value) == left


def test_the_embedded_model_has_a_name_that_holds_everywhere():
    found = identity(embedded.MODEL_DIR, "ab")
    assert (found.name, found.repository) == ("embedded", None)


def test_a_folder_anywhere_else_is_known_by_its_own_name():
    assert identity(Path("/home/me/models/mine"), "ab").name == "mine"


def test_a_folder_that_only_looks_like_the_hub_s_is_known_by_its_own_name():
    found = identity(Path("/home/me/models--o--n/snapshots/my copy"), "ab")
    assert (found.name, found.revision) == ("my copy", None)
