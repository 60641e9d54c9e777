"""Model folders compared by their bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nexus_cli.errors import ArtifactError
from nexus_cli.io import tensor_files


def write(folder: Path, **tensors: np.ndarray) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_equal_copies_do_not_differ_whatever_else_the_model_has(tmp_path: Path) -> None:
    base = write(tmp_path / "base", a=WEIGHT)
    model = write(tmp_path / "model", added=WEIGHT + 1, a=WEIGHT)
    assert tensor_files.differing(model, base) == []
    assert tensor_files.differing(base, model) == ["added"]


@pytest.mark.parametrize(
    "other", [np.nextafter(WEIGHT, 99), WEIGHT.reshape(4, 3), WEIGHT.view(np.int32)]
)
def test_other_bytes_shapes_and_dtypes_differ(tmp_path: Path, other: np.ndarray) -> None:
    base, model = write(tmp_path / "base", a=WEIGHT), write(tmp_path / "model", a=other)
    assert tensor_files.differing(model, base) == ["a"]


def test_a_difference_past_the_first_chunk_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK", 8)
    changed = WEIGHT.copy()
    changed[-1, -1] += 1
    base, model = write(tmp_path / "base", a=WEIGHT), write(tmp_path / "model", a=changed)
    assert tensor_files.differing(model, base) == ["a"]


def test_linked_shards_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write(tmp_path / "base", a=WEIGHT)
    (tmp_path / "model").mkdir()
    os.link(base / "model.safetensors", tmp_path / "model" / "model.safetensors")
    monkeypatch.setattr(tensor_files, "_read", None)
    assert tensor_files.differing(tmp_path / "model", base) == []


def test_parameters_are_counted_as_people_do(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "m",
        x_blocks=np.zeros((2, 16), np.uint8),
        x_scales=np.zeros(2, np.uint8),
        weight=WEIGHT,
    )
    assert tensor_files.num_parameters(tensor_files.tensors(folder)) == 64 + 12


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", a=WEIGHT)
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="lacks the tensor b"):
        tensor_files.tensors(base)


def test_a_tensor_that_the_index_does_not_place_in_its_shard_is_named(tmp_path: Path) -> None:
    base = write(tmp_path / "base", a=WEIGHT, b=WEIGHT)
    assert tensor_files.misplaced(base) is None
    index = {"weight_map": {"a": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    problem = tensor_files.misplaced(base)
    assert problem == "model.safetensors holds b, which the index lists in no shard"


def test_bytes_are_read_from_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    into = bytearray(10)
    tensor_files.read_into(path, 42, memoryview(into))
    assert bytes(into) == bytes(range(42, 52))
    with pytest.raises(ArtifactError, match="truncated: 5 bytes are missing"):
        tensor_files.read_into(path, 95, memoryview(into))
