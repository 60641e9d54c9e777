"""Which repository a folder of the hub's cache is of, and where that cache is."""

from pathlib import Path

import pytest

from nexus_cli.io import hub_cache

VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/a/hub/models--openai--gpt-oss-20b/snapshots/6cee", ("openai/gpt-oss-20b", "6cee")),
        ("/a/models--gpt2/snapshots/6cee", ("gpt2", "6cee")),
        ("/a/datasets--o--n/snapshots/6cee", None),
        ("/a/models--o--n/blobs/6cee", None),
        ("/models/gpt-oss-20b", None),
        ("/", None),
    ],
)
def test_a_snapshot_names_its_repository(path, found):
    assert hub_cache.repository_of(Path(path)) == found


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hub_s_tools_have_it(monkeypatch, environment, place):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hub_cache.root() == Path(place)


def test_snapshots_begin_with_the_one_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for revision in ("aa", "bb", "cc"):
        (tmp_path / "models--o--n" / "snapshots" / revision).mkdir(parents=True)
    assert [p.name for p in hub_cache.snapshots("o/n", "bb")] == ["bb", "aa", "cc"]
    assert not list(hub_cache.snapshots("o/other", None))
