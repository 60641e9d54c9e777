"""Write a checkpoint of GPT-OSS's real shapes, with made-up bytes, faster than a disk takes them.

Names, dtypes, shapes, packing and the size of a shard are those of the published checkpoints; the
values are not. Packed weights are random bytes and the rest is N(0, 0.02), both cut from one pool
of 64 MiB at random offsets, so tensors repeat pieces of each other. Scales lie between 2^-9 and
2^-2. Tokenizer and template are the embedded model's.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nexus_cli.embedded import MODEL_DIR

HIDDEN, WIDTH, VOCABULARY = 2880, 2880, 201_088
HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 64, 8, 64
SHARD_BYTES = 4_800_000_000
POOL_BYTES = 2**26
SCALES = (118, 126)
ITEM_BYTES = {"U8": 1, "BF16": 2}

Stored = tuple[str, tuple[int, ...]]  # a tensor's dtype, as safetensors spells it, and shape


@dataclass(frozen=True)
class Shape:
    """What tells one size of GPT-OSS from another."""

    layers: int
    experts: int


SHAPES = {"20b": Shape(24, 32), "120b": Shape(36, 128)}


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Write config, tokenizer, shards and index into a new folder; returns the shards' bytes."""
    folder.mkdir(parents=True)
    for file in MODEL_DIR.iterdir():
        if file.suffix in {".json", ".jinja"} and not file.name.startswith(("model", "training")):
            shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=2), encoding="utf-8")
    shards = list(_shards(tensors(shape)))
    source = _Source()
    weight_map, total = {}, 0
    for number, held in enumerate(shards):
        # The published ones count like this: 00000 of 00014 is the first of fifteen.
        name = f"model-{number:05}-of-{len(shards) - 1:05}.safetensors"
        total += _write_shard(folder / name, held, source)
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def config(shape: Shape) -> dict[str, Any]:
    """The published ``config.json`` with ``shape``'s number of layers and experts."""
    values: dict[str, Any] = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    kinds = ("sliding_attention", "full_attention")
    return values | {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_SIZE,
        "num_hidden_layers": shape.layers,
        "num_local_experts": shape.experts,
        "layer_types": [kinds[layer % 2] for layer in range(shape.layers)],
    }


def tensors(shape: Shape) -> dict[str, Stored]:
    """Every tensor of the checkpoint, by name."""
    found: dict[str, Stored] = {"model.embed_tokens.weight": ("BF16", (VOCABULARY, HIDDEN))}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        found |= {prefix + name: stored for name, stored in _layer(shape.experts).items()}
    found["model.norm.weight"] = ("BF16", (HIDDEN,))
    found["lm_head.weight"] = ("BF16", (VOCABULARY, HIDDEN))
    return found


def _layer(experts: int) -> dict[str, Stored]:
    found: dict[str, Stored] = {
        "input_layernorm.weight": ("BF16", (HIDDEN,)),
        "post_attention_layernorm.weight": ("BF16", (HIDDEN,)),
        "self_attn.sinks": ("BF16", (HEADS,)),
        "mlp.router.weight": ("BF16", (experts, HIDDEN)),
        "mlp.router.bias": ("BF16", (experts,)),
    }
    query, key = HEADS * HEAD_SIZE, KEY_VALUE_HEADS * HEAD_SIZE
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key), ("o_proj", HIDDEN)):
        columns = query if name == "o_proj" else HIDDEN
        found[f"self_attn.{name}.weight"] = ("BF16", (rows, columns))
        found[f"self_attn.{name}.bias"] = ("BF16", (rows,))
    for name, rows, columns in (
        ("gate_up_proj", 2 * WIDTH, HIDDEN),
        ("down_proj", HIDDEN, WIDTH),
    ):
        found[f"mlp.experts.{name}_blocks"] = ("U8", (experts, rows, columns // 32, 16))
        found[f"mlp.experts.{name}_scales"] = ("U8", (experts, rows, columns // 32))
        found[f"mlp.experts.{name}_bias"] = ("BF16", (experts, rows))
    return found


def size_of(stored: Stored) -> int:
    """Bytes of a tensor."""
    return math.prod(stored[1]) * ITEM_BYTES[stored[0]]


def _shards(found: dict[str, Stored]) -> Iterator[dict[str, Stored]]:
    """Tensors in order, as many to a shard as fit."""
    held: dict[str, Stored] = {}
    for name, stored in found.items():
        if held and sum(map(size_of, held.values())) + size_of(stored) > SHARD_BYTES:
            yield held
            held = {}
        held[name] = stored
    yield held


def _write_shard(path: Path, held: dict[str, Stored], source: _Source) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in held.items():
        begin, end = end, end + size_of(stored)
        header[name] = {"dtype": stored[0], "shape": stored[1], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, stored in held.items():
            source.write(file, name, stored)
    return end


class _Source:
    """Bytes of each kind, from pools that are made once."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        count = POOL_BYTES // 2
        normal = self._rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
        self._pools = {
            "blocks": self._rng.bytes(POOL_BYTES),
            "scales": self._rng.integers(*SCALES, POOL_BYTES, dtype=np.uint8).tobytes(),
            "float": (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes(),  # bf16
        }

    def write(self, file: BinaryIO, name: str, stored: Stored) -> None:
        """Write one tensor's bytes."""
        pool = memoryview(self._pools[name.rpartition("_")[2] if stored[0] == "U8" else "float"])
        left = size_of(stored)
        while left:
            start = 2 * int(self._rng.integers(POOL_BYTES // 4))
            piece = pool[start : start + left]
            left -= file.write(piece)
