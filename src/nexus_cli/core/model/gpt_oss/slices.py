"""Read single experts from a checkpoint, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4
from nexus_cli.errors import ArtifactError
from nexus_cli.io import model_dir

# Shape letters in this file: H hidden, I expert width.


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's six tensors in float32, gate and up apart, in the layout of nn.Linear."""

    gate_IH: Tensor
    gate_bias_I: Tensor
    up_IH: Tensor
    up_bias_I: Tensor
    down_HI: Tensor
    down_bias_H: Tensor


class ExpertReader:
    """Slices of the routed experts; only the bytes asked for are read."""

    def __init__(self, files: dict[str, Any], folder: Path) -> None:
        self._files = files
        self._folder = folder

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """Decode one expert.

        Raises:
            ArtifactError: the checkpoint lacks a tensor of that layer, or is damaged.
        """
        gate_up = self._weight(layer, "gate_up_proj", expert)
        bias = self._slice(layer, "gate_up_proj_bias", expert).float()
        return ExpertWeights(
            gate_IH=gate_up[0::2],
            gate_bias_I=bias[0::2],
            up_IH=gate_up[1::2],
            up_bias_I=bias[1::2],
            down_HI=self._weight(layer, "down_proj", expert),
            down_bias_H=self._slice(layer, "down_proj_bias", expert).float(),
        )

    def _weight(self, layer: int, name: str, expert: int) -> Tensor:
        blocks = self._slice(layer, f"{name}_blocks", expert)
        scales = self._slice(layer, f"{name}_scales", expert)
        return dequantize_mxfp4(blocks, scales, torch.float32)

    def _slice(self, layer: int, name: str, expert: int) -> Tensor:
        key = f"model.layers.{layer}.mlp.experts.{name}"
        if key not in self._files:
            raise ArtifactError(
                f"{self._folder} has no tensor {key}",
                hint="use an original MXFP4 checkpoint of GPT-OSS",
            )
        try:
            part: Tensor = self._files[key].get_slice(key)[expert]
        except SafetensorError as error:
            raise ArtifactError(f"{self._folder}: cannot read {key}: {error}") from error
        return part


@contextmanager
def open_experts(folder: Path) -> Iterator[ExpertReader]:
    """Open every shard of a model folder for reading slices."""
    weight_map = model_dir.weight_map(folder)
    for name in sorted(set(weight_map.values())):
        model_dir.read_header(folder / name)
    with ExitStack() as held:
        opened = {
            name: held.enter_context(safe_open(folder / name, framework="pt"))
            for name in sorted(set(weight_map.values()))
        }
        yield ExpertReader({key: opened[name] for key, name in weight_map.items()}, folder)
