"""Which changes of a shard give it another identity, and which do not."""

from __future__ import annotations

import json
import struct

import pytest

from nexus_cli.errors import ArtifactError
from nexus_cli.io.shard_identity import PAGE_BYTES, PAGES, WHOLE_BYTES, shard_digest

MIB = 2**20
# A shard of 40 MiB, most of it one tensor: pages that were evenly spaced over the file alone would
# lie 2.7 MiB apart, and miss the small ones.
SIZES = {"experts": 20 * MIB, "router": 1024, "bias": WHOLE_BYTES, "attention": 9 * MIB + 6}
SIZES |= {"rest": 40 * MIB - sum(SIZES.values())}


@pytest.fixture
def shard(tmp_path):
    """The shard, of zeros that the disk does not hold, and where each tensor begins."""
    entries, end = {}, 0
    for name, size in SIZES.items():
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    path, start = tmp_path / "model.safetensors", 8 + len(header)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with path.open("r+b") as file:
        file.truncate(start + end)
    return path, {name: start + entry["data_offsets"][0] for name, entry in entries.items()}


def write(path, at, content):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize("name", ["router", "bias"])
@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_any_byte_of_a_small_tensor_shows(shard, name, at):
    path, starts = shard
    before = shard_digest(path)
    offset = {"first": 0, "middle": SIZES[name] // 2 + 1, "last": SIZES[name] - 1}[at]
    write(path, starts[name] + offset, b"\1")
    assert shard_digest(path) != before


@pytest.mark.parametrize("name", ["experts", "attention", "rest"])
def test_a_large_tensor_whose_bytes_all_changed_shows(shard, name):
    path, starts = shard
    before = shard_digest(path)
    write(path, starts[name], b"\1" * SIZES[name])
    assert shard_digest(path) != before


@pytest.mark.parametrize("number", range(PAGES))
def test_the_pages_of_a_large_tensor_are_spaced_evenly_from_its_first_to_its_last(shard, number):
    path, starts = shard
    before = shard_digest(path)
    at = (SIZES["attention"] - PAGE_BYTES) * number // (PAGES - 1)
    write(path, starts["attention"] + at, b"\1")
    first = shard_digest(path)
    assert first != before
    write(path, starts["attention"] + at + PAGE_BYTES - 1, b"\1")
    assert shard_digest(path) != first


def test_a_number_between_the_pages_of_a_large_tensor_does_not_show(shard):
    path, starts = shard
    before = shard_digest(path)
    write(path, starts["experts"] + PAGE_BYTES, b"\1")
    assert shard_digest(path) == before


def test_the_same_bytes_under_another_name_are_another_shard(shard):
    path, _ = shard
    before = shard_digest(path)
    write(path, 8, path.read_bytes()[8:200].replace(b'"router"', b'"touter"'))
    assert shard_digest(path) != before


@pytest.mark.parametrize("offsets", [[-4, 8], [8, 4, 8], [8, 4], [0, 8.0], [None, 8]], ids=str)
def test_offsets_that_make_no_span_are_a_damaged_header(tmp_path, offsets):
    entries = {"a": {"dtype": "U8", "shape": [8], "data_offsets": offsets}}
    entries["b"] = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    header = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ArtifactError, match="damaged header"):
        shard_digest(path)
