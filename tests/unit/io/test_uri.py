"""Spellings of a location, and the type of a setting that holds one."""

from pathlib import Path

import pytest

from nexus_cli.config.base import ConfigModel
from nexus_cli.config.places import FolderOrUri
from nexus_cli.errors import ConfigError
from nexus_cli.io.uri import parse


@pytest.mark.parametrize(
    ("where", "scheme", "path", "root"),
    [
        ("s3://bucket/a/b", "s3", "bucket/a/b", "bucket"),
        ("s3://bucket/a/b/", "s3", "bucket/a/b", "bucket"),
        (" S3://bucket ", "s3", "bucket", "bucket"),
        ("gs://bucket/a", "gs", "bucket/a", "bucket"),
        ("hf://datasets/o/n/a/b/", "hf", "datasets/o/n/a/b", "datasets/o/n"),
        (
            "hf://datasets/o/n@refs/pr/1/a",
            "hf",
            "datasets/o/n@refs/pr/1/a",
            "datasets/o/n",
        ),
        ("hf://o/n/a", "hf", "o/n/a", "o/n"),
    ],
)
def test_a_uri_is_taken_apart(where, scheme, path, root):
    place = parse(where)
    assert (place.scheme, place.path, place.root) == (scheme, path, root)
    assert str(place) == f"{scheme}://{path}"


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ("a/b/", "a/b"),
        ("/a/b", "/a/b"),
        ("file:///a/b%20c/", "/a/b c"),
        ("file:/a", "/a"),
        ("file://localhost/a", "/a"),
        ("run:/1", "run:/1"),
        (Path("a/b"), "a/b"),
    ],
)
def test_a_local_path_stays_a_path(where, path):
    assert parse(where).scheme == "file"
    assert parse(where).path == path


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("~/store/").path == "/home/me/store"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "the location of a folder is empty"),
        ("ftp://host/a", "ftp:// is not understood"),
        ("s3:/bucket/a", "s3:/bucket/a needs two slashes after s3:"),
        (Path("s3://bucket/a"), "s3:/bucket/a needs two slashes after s3:"),
        ("s3://", "s3:// names no bucket"),
        ("s3:///a", "needs two slashes"),
        ("s3://b//a", "has an empty part between two slashes"),
        ("gs://my bucket/a", "names no bucket"),
        ("hf://datasets/owner", "names no data set"),
        ("hf://datasets/o/n//a", "names no data set"),
        ("file://a/b", "names no absolute path"),
        ("~nobody-of-that-name/a", "names no home folder"),
    ],
)
def test_a_spelling_that_is_not_understood(where, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(where)
    assert caught.value.hint


@pytest.mark.parametrize("where", ["s3://id:s3cret@bucket/a", "s3://bucket/a?secret_key=s3cret"])
def test_a_secret_in_a_uri_is_refused_and_not_repeated(where):
    with pytest.raises(ConfigError, match="takes no credentials and no options") as caught:
        parse(where)
    assert "s3cret" not in f"{caught.value} {caught.value.hint}"


class _Settings(ConfigModel):
    store: FolderOrUri


def test_a_setting_keeps_both_slashes_and_expands_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert _Settings(store="s3://a/b/").store == "s3://a/b"
    assert _Settings(store=Path("x/y")).store == "x/y"
    assert _Settings(store="~/y").store == "/home/me/y"
    assert _Settings(store="file:///y").store == "/y"


def test_a_setting_says_what_is_understood():
    with pytest.raises(ValueError, match="ftp:// is not understood; a location is a path"):
        _Settings(store="ftp://a/b")
    with pytest.raises(ValueError, match="valid string"):
        _Settings(store=3)
