import io
import pickle

import numpy as np
import pytest

from nexus_cli.errors import ArtifactError
from nexus_cli.io import router_probs

SHAPE = {"num_layers": 2, "num_experts": 3, "top_k": 1}


def arrays(tokens=5):
    """Sums of a router that sends every token to expert 1 with certainty."""
    certain = np.array([0, tokens, 0])
    found = {"reservoir_keys": np.arange(2, dtype=np.uint64)}
    found["reservoir_probability"] = np.zeros((2, 2, 3), np.float16)
    for population in router_probs.POPULATIONS:
        found[f"{population}_tokens"] = np.array(tokens)
        found[f"{population}_outer"] = np.stack([np.diag(certain.astype(float))] * 2)
        for name in ("probability", "weight"):
            found[f"{population}_{name}"] = np.stack([certain.astype(float)] * 2)
        for name in ("top1", "topk"):
            found[f"{population}_{name}"] = np.stack([certain] * 2)
    return found


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data" / "router_probs.npz"
    router_probs.write(path, arrays(), {**SHAPE, "model": "x"})
    return path


def refuses(path, match):
    with pytest.raises(ArtifactError, match=match) as caught:
        router_probs.read(path)
    assert "nexus collect" in caught.value.hint


def test_what_is_written_is_read(path):
    found = router_probs.read(path)
    assert found.metadata == {"format": "nexus.router_probs/1", "model": "x", **SHAPE}
    for name, array in arrays().items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype


def test_equal_contents_are_equal_bytes(path, tmp_path):
    again = tmp_path / "again.npz"
    router_probs.write(again, arrays(), {"model": "x", **SHAPE})
    assert again.read_bytes() == path.read_bytes()


def test_a_missing_file_is_said(tmp_path):
    refuses(tmp_path / "none.npz", "does not exist")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_refused(path, kept):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    refuses(path, "cut short")


def test_a_flipped_byte_is_noticed(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(ArtifactError):
        router_probs.read(path)


@pytest.mark.parametrize("content", [b"hello", pickle.dumps([1]), b"PK\x03\x04"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "f.npz"
    path.write_bytes(content)
    refuses(path, "not a nexus.router_probs/1")


def test_a_single_array_and_a_foreign_archive_are_refused(tmp_path):
    path = tmp_path / "f.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    path.write_bytes(buffer.getvalue())
    refuses(path, "single array")
    np.savez(path, router_probs=np.ones((2, 2)))
    refuses(path, "no metadata")


def test_pickled_metadata_is_never_loaded(path):
    np.savez(path, metadata=np.array({"format": "nexus.router_probs/1"}, dtype=object))
    refuses(path, "cut short or not")


def test_another_version_is_named(path):
    text = b'{"format": "nexus.router_probs/2"}'
    np.savez(path, metadata=np.frombuffer(text, np.uint8))
    refuses(path, "router_probs/2")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("body_outer", np.zeros((2, 3, 4)), "body_outer is"),
        ("body_tokens", np.array(6), "does not add up to 6"),
        ("first_probability", np.full((2, 3), np.nan), "first_probability does not add up"),
        ("body_topk", np.zeros((2, 3), np.int64), "body_topk does not add up"),
        ("body_outer", np.zeros((2, 3, 3)), "rows of body_outer"),
        ("reservoir_probability", np.zeros((3, 2, 3), np.float16), "reservoir is of shape"),
        ("reservoir_keys", np.zeros(2), "reservoir is of float64"),
    ],
)
def test_statistics_that_contradict_each_other_are_refused(path, name, value, match):
    router_probs.write(path, {**arrays(), name: value}, SHAPE)
    refuses(path, match)


def test_a_missing_array_or_size_is_named(path):
    kept = {name: array for name, array in arrays().items() if name != "body_top1"}
    router_probs.write(path, kept, SHAPE)
    refuses(path, "lacks body_top1")
    router_probs.write(path, arrays(), {"num_layers": 2, "num_experts": 3})
    refuses(path, "lacks top_k")
