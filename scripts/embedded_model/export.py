"""The trained model as a checkpoint folder in openai/gpt-oss's own names and format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from masters import is_packed_weight
from safetensors.torch import save_file
from torch import Tensor, nn

from nexus_cli.core.model.gpt_oss.mxfp4 import quantize_mxfp4

NUM_SHARDS = 2


def export_model(model: nn.Module, fields: dict[str, Any], folder: Path) -> None:
    """Write shards, their index and ``config.json``.

    Args:
        model: dense, its experts already on the MXFP4 grid, so that packing loses nothing.
        fields: of ``config.json``.
        folder: where the tokenizer lies too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint_tensors(model.named_parameters())
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    done = 0
    for name, tensor in tensors.items():
        shards[min(NUM_SHARDS - 1, NUM_SHARDS * done // sum(sizes.values()))][name] = tensor
        done += sizes[name]
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", fields)


def checkpoint_tensors(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The checkpoint's tensors: packed experts as uint8, everything else in bf16."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters:
        weight = parameter.detach()
        if is_packed_weight(name):
            blocks, scales = quantize_mxfp4(weight.transpose(1, 2))
            tensors[f"{name}_blocks"] = blocks.cpu().contiguous()
            tensors[f"{name}_scales"] = scales.cpu().contiguous()
        else:
            tensors[name] = weight.to(torch.bfloat16).cpu().contiguous()
    return tensors


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
