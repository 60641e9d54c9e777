"""Locations on this machine, on an S3 server, and through fsspec's ``memory`` in the hub's place.

Stubbed: HfFileSystem (fsspec's MemoryFileSystem stands in for it), Amazon's answer to the question
in which region a bucket is, and servers that do not answer. Google's store is only opened.
"""

import hashlib
import pickle
import socket
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from nexus_cli.errors import ArtifactError, ConfigError, ResourceError
from nexus_cli.io import filesystems
from nexus_cli.io.location import PIECE_BYTES, Location, locate, reading

LARGE = np.random.default_rng(0).bytes(PIECE_BYTES + 1000)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder of the shape of a store."""
    root = tmp_path_factory.mktemp("tree")
    (root / "store.json").write_bytes(b'{"a": 1}')
    (root / "large.bin").write_bytes(LARGE)
    (root / "empty").write_bytes(b"")
    (root / "shards").mkdir()
    table = pa.table({"x": np.arange(1000), "y": np.arange(1000) / 7})
    pq.write_table(table, root / "shards" / "00000.parquet", row_group_size=100)
    return root


@pytest.fixture
def quick(monkeypatch):
    """Give up at once."""
    monkeypatch.setattr(filesystems, "S3_ATTEMPTS", 1)
    monkeypatch.setattr(filesystems, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(filesystems, "CONNECT_SECONDS", 1.0)


@pytest.fixture
def hub(monkeypatch):
    """fsspec's ``memory`` where the hub's filesystem would be; emptied afterwards."""
    monkeypatch.setattr("huggingface_hub.HfFileSystem", MemoryFileSystem)
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()


def _holds_the_tree(location):
    assert location.is_dir()
    assert not location.is_file()
    assert (location / "shards").is_dir()
    assert not (location / "absent").is_file()
    assert not (location / "absent").is_dir()
    store = location / "store.json"
    assert store.is_file()
    assert not store.is_dir()
    assert store.shown == location.shown.rstrip("/") + "/store.json"
    assert store.size() == 8
    assert store.read_bytes() == b'{"a": 1}'
    assert (location / "empty").read_bytes() == b""
    assert (location / "large.bin").sha256() == hashlib.sha256(LARGE).hexdigest()
    with (location / "large.bin").open() as file:
        assert file.read_at(10, PIECE_BYTES) == LARGE[PIECE_BYTES : PIECE_BYTES + 10]
    with (location / "shards/00000.parquet").open() as file:
        rows = pq.ParquetFile(file).read_row_group(3, columns=["x"])
    assert rows["x"].to_pylist() == list(range(300, 400))
    for read in (lambda x: x.size(), lambda x: x.read_bytes(), lambda x: x.sha256()):
        with pytest.raises(ArtifactError, match=r"absent is not there") as caught:
            read(location / "absent")
        assert caught.value.hint


def test_a_local_folder(tree, monkeypatch):
    _holds_the_tree(locate(tree))
    _holds_the_tree(locate(f"{tree}/"))
    _holds_the_tree(locate(f"file://{tree}"))
    monkeypatch.chdir(tree.parent)
    relative = locate(tree.name)
    monkeypatch.chdir("/")
    _holds_the_tree(relative)
    assert relative.shown == tree.name
    assert relative.local == tree
    monkeypatch.setenv("HOME", str(tree.parent))
    assert locate(f"~/{tree.name}/").local == tree


def test_a_local_file_is_mapped(tree):
    with (locate(tree) / "large.bin").open() as file:
        assert isinstance(file, pa.MemoryMappedFile)


def test_a_local_folder_that_is_not_there(tmp_path):
    assert not locate(tmp_path / "absent").is_dir()


def test_a_folder_has_no_bytes(tree):
    with pytest.raises(ArtifactError, match="shards is not there"):
        (locate(tree) / "shards").size()
    with pytest.raises(ResourceError, match=r"cannot read .*shards: "):
        (locate(tree) / "shards").read_bytes()


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", ""])
def test_a_name_that_leads_outside(tree, name):
    with pytest.raises(ArtifactError, match="names a file outside itself"):
        locate(tree) / name


def test_an_s3_folder(s3, tree):
    uri = s3.upload(tree, "location/tree")
    _holds_the_tree(locate(uri))
    _holds_the_tree(locate(uri + "/"))
    assert locate(uri).local is None
    assert not locate(s3.uri("location/absent")).is_dir()
    assert locate(s3.uri()).is_dir()


def test_an_s3_endpoint_has_three_spellings(s3, tree, monkeypatch):
    uri = s3.upload(tree, "location/tree")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url + "/")  # goes first
    assert locate(uri).is_dir()
    monkeypatch.delenv("AWS_REGION")
    assert locate(uri).filesystem.region == "us-east-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url.removeprefix("http://"))
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL_S3 is .*, which is no URL"):
        locate(uri)


def test_an_s3_bucket_that_is_not_there(s3):
    with pytest.raises(ArtifactError, match=f"{s3.url} has no bucket absent") as caught:
        locate("s3://absent/a")
    assert "AWS_ENDPOINT_URL" in caught.value.hint


def test_s3_credentials_that_are_wrong_or_not_there(s3, tree, monkeypatch):
    uri = s3.upload(tree, "location/tree")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ResourceError, match=f"{uri}: {s3.url} refuses the credentials") as caught:
        locate(uri)
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ResourceError, match="refuses the credentials"):
        locate(uri)


@pytest.mark.usefixtures("s3", "quick")
def test_an_s3_server_that_is_not_there_or_says_nothing(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        ResourceError, match=r"s3://b/a: http://127\.0\.0\.1:9 does not answer"
    ) as caught:
        locate("s3://b/a")
    assert caught.value.hint == "check the network, and AWS_ENDPOINT_URL"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ResourceError, match="does not answer"):
            locate("s3://b/a")


@pytest.mark.usefixtures("s3")
def test_the_region_of_a_bucket_at_amazon_is_asked_for(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_REGION")
    asked = []

    def resolve(bucket):
        asked.append(bucket)
        raise OSError("AWS Error NETWORK_CONNECTION during HeadBucket operation")

    monkeypatch.setattr(fs, "resolve_s3_region", resolve)
    with pytest.raises(ResourceError, match="Amazon S3 does not answer"):
        locate("s3://bucket/a")
    assert asked == ["bucket"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("AWS Error NETWORK_CONNECTION during GetObject operation", "does not answer"),
        ("AWS Error SLOW_DOWN during GetObject operation", "does not answer"),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject", "is in another region"),
        ("AWS Error EXPIRED_TOKEN during GetObject operation", "refuses the credentials"),
        ("AWS Error INTERNAL_FAILURE\n during GetObject", "AWS Error INTERNAL_FAILURE during"),
    ],
)
def test_a_read_that_fails_after_opening_is_explained_too(s3, tree, said, reason):
    location = locate(s3.upload(tree, "location/tree")) / "large.bin"
    with pytest.raises(ResourceError, match=rf"large\.bin: .*{reason}"), reading(location):
        raise OSError(said)


def test_a_gs_store_without_credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    monkeypatch.setattr(filesystems, "GCS_SECONDS", 0.5)
    with pytest.raises(ResourceError, match="gs://bucket/a: there are no cred") as caught:
        locate("gs://bucket/a")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in caught.value.hint


def test_what_a_damaged_file_raises_passes_through(tree):
    location = Location(fs.LocalFileSystem(), str(tree), "gs://b/a", scheme="gs")
    with pytest.raises(pa.ArrowInvalid, match="magic bytes"), reading(location):
        pq.ParquetFile(pa.py_buffer(LARGE))


def test_a_location_can_be_sent_to_another_process(s3, tree):
    location = locate(s3.upload(tree, "location/tree"))
    assert pickle.loads(pickle.dumps(location)) == location


def test_a_hub_folder(hub, tree):
    hub.put(str(tree), "datasets/owner/name/tree", recursive=True)
    _holds_the_tree(locate("hf://datasets/owner/name/tree/"))
    assert not locate("hf://datasets/owner/name/absent").is_dir()
    with pytest.raises(ArtifactError, match="the hub has no datasets/owner/other") as caught:
        locate("hf://datasets/owner/other/a")
    assert "HF_TOKEN" in caught.value.hint


def test_the_hub_when_it_is_switched_off(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE is set") as caught:
        locate("hf://datasets/owner/name/a")
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_the_hub_needs_its_package(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ResourceError, match="needs the package huggingface_hub") as caught:
        locate("hf://datasets/owner/name/a")
    assert caught.value.hint == "install the extra: pip install 'nexus-cli[hub]'"


def test_a_pyarrow_without_a_store(monkeypatch):
    def absent(**_):
        raise ImportError("not built with support for 'GcsFileSystem'")

    monkeypatch.setattr(fs, "GcsFileSystem", absent)
    with pytest.raises(ResourceError, match="this pyarrow was built without gs://"):
        locate("gs://bucket/a")
