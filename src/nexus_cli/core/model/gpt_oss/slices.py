"""Read single experts from a checkpoint, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4
from nexus_cli.core.model.gpt_oss.mxfp4 import BLOCK_SIZE, add_mxfp4_
from nexus_cli.errors import ArtifactError
from nexus_cli.io import tensor_files
from nexus_cli.io.model_dir import ModelShape

# Shape letters in this file: H hidden, I expert width.

DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16}
ROWS = 512  # of a weight, added at a time
Packed = Mapping[str, Tensor]  # one expert's tensors as stored, by their names without the prefix


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's six tensors in float32, gate and up apart, in the layout of nn.Linear."""

    gate_IH: Tensor
    gate_bias_I: Tensor
    up_IH: Tensor
    up_bias_I: Tensor
    down_HI: Tensor
    down_bias_H: Tensor

    @classmethod
    def from_interleaved(
        cls, gate_up: Tensor, gate_up_bias: Tensor, down_HI: Tensor, down_bias_H: Tensor
    ) -> ExpertWeights:
        """From rows ``[2I, H]`` of gate and up in turn, as checkpoints hold them."""
        return cls(
            gate_IH=gate_up[0::2],
            gate_bias_I=gate_up_bias[0::2],
            up_IH=gate_up[1::2],
            up_bias_I=gate_up_bias[1::2],
            down_HI=down_HI,
            down_bias_H=down_bias_H,
        )


class ExpertSum:
    """A float32 sum of experts, which are decoded as they are added, a few rows at a time."""

    def __init__(self, width: int, hidden_size: int) -> None:
        self._gate_up = torch.zeros(2 * width, hidden_size)
        self._gate_up_bias = torch.zeros(2 * width)
        self._down_HI = torch.zeros(hidden_size, width)
        self._down_bias_H = torch.zeros(hidden_size)
        self._count = 0

    def add(self, packed: Packed, workers: Executor) -> None:
        """Add one expert, as :meth:`ExpertReader.packed` gives it, with :func:`row_workers`."""
        jobs = [
            workers.submit(add_mxfp4_, *rows)
            for name, total in (("gate_up_proj", self._gate_up), ("down_proj", self._down_HI))
            for rows in zip(
                total.split(ROWS),
                packed[f"{name}_blocks"].split(ROWS),
                packed[f"{name}_scales"].split(ROWS),
                strict=True,
            )
        ]
        for job in jobs:
            job.result()
        self._gate_up_bias += packed["gate_up_proj_bias"]
        self._down_bias_H += packed["down_proj_bias"]
        self._count += 1

    def mean(self) -> ExpertWeights:
        """The mean of what was added; the sum is used up.

        Raises:
            ValueError: nothing was added.
        """
        if not self._count:
            raise ValueError("no expert to average")
        sums = (self._gate_up, self._gate_up_bias, self._down_HI, self._down_bias_H)
        return ExpertWeights.from_interleaved(*(total.div_(self._count) for total in sums))


@contextmanager
def row_workers() -> Iterator[Executor]:
    """As many threads as torch would use; inside, torch's own operations do not split.

    Split ones meet at a barrier after each step, and where another program has one of the cores,
    all of them wait for it every time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="add-experts") as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


class ExpertReader:
    """Slices of a folder's routed experts; only the bytes asked for are read."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        """Check the headers of all shards; no weights are read.

        Args:
            folder: an MXFP4 checkpoint of GPT-OSS.
            shape: what its config says.

        Raises:
            ArtifactError: a shard is missing or damaged, or the experts are not all there, packed,
                in the shapes that the config gives.
        """
        self.shape = shape
        self._parts = expert_parts(shape)
        self._stored = _experts(folder, tensor_files.tensors(folder), shape)

    def packed(self, layer: int, expert: int) -> Packed:
        """One expert's bytes as stored: see :func:`expert_parts`.

        Raises:
            ArtifactError: a shard cannot be read.
        """
        return {name: self._slice(layer, name, expert) for name in self._parts}

    def stream(self, places: Sequence[tuple[int, int]]) -> Iterator[Packed]:
        """Experts at ``(layer, expert)`` in order; the next is read while one is worked on.

        Raises:
            ArtifactError: as :meth:`packed`.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="read-experts") as pool:
            ahead = [pool.submit(self.packed, *place) for place in places[:1]]
            for place in places[1:]:
                ahead.append(pool.submit(self.packed, *place))
                yield ahead.pop(0).result()
            for last in ahead:
                yield last.result()

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """Decode one expert.

        Raises:
            ArtifactError: as :meth:`packed`.
        """
        packed = self.packed(layer, expert)
        gate_up, down = (
            dequantize_mxfp4(packed[f"{n}_blocks"], packed[f"{n}_scales"], torch.float32)
            for n in ("gate_up_proj", "down_proj")
        )
        gate_up_bias, down_bias = packed["gate_up_proj_bias"], packed["down_proj_bias"]
        return ExpertWeights.from_interleaved(
            gate_up, gate_up_bias.float(), down, down_bias.float()
        )

    def _slice(self, layer: int, name: str, expert: int) -> Tensor:
        stored = self._stored[_key(layer, name)]
        dtype, shape = self._parts[name]
        part = torch.empty(shape, dtype=DTYPES[dtype])
        begin = stored.begin + expert * part.nbytes
        tensor_files.read_into(stored.shard, begin, part.view(-1).view(torch.uint8).numpy().data)
        return part


def expert_parts(shape: ModelShape) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype, as safetensors spells it, and shape of each of one expert's tensors."""
    hidden, width = shape.hidden_size, shape.intermediate_size
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
        found[f"{name}_blocks"] = ("U8", (rows, columns // BLOCK_SIZE, BLOCK_SIZE // 2))
        found[f"{name}_scales"] = ("U8", (rows, columns // BLOCK_SIZE))
        found[f"{name}_bias"] = ("BF16", (rows,))
    return found


def expert_bytes(shape: ModelShape) -> int:
    """Bytes of one expert as stored."""
    parts = expert_parts(shape).values()
    return sum(torch.Size(size).numel() * DTYPES[dtype].itemsize for dtype, size in parts)


def _experts(
    folder: Path, stored: Mapping[str, tensor_files.Tensor], shape: ModelShape
) -> dict[str, tensor_files.Tensor]:
    """The experts' tensors of every layer, each of them checked."""
    found: dict[str, tensor_files.Tensor] = {}
    for layer in range(shape.num_layers):
        for name, (dtype, size) in expert_parts(shape).items():
            key, whole = _key(layer, name), (shape.num_experts, *size)
            if key not in stored:
                raise ArtifactError(
                    f"{folder} has no tensor {key}",
                    hint="use an original MXFP4 checkpoint of GPT-OSS",
                )
            tensor = stored[key]
            held = torch.Size(whole).numel() * DTYPES[dtype].itemsize
            if (tensor.dtype, tensor.shape, tensor.end - tensor.begin) != (dtype, whole, held):
                raise ArtifactError(
                    f"{tensor.shard} holds {key} as {tensor.dtype} {list(tensor.shape)}; by its "
                    f"config.json {folder} has {dtype} {list(whole)}",
                    hint="download the config, the index and all shards of one model",
                )
            found[key] = tensor
    return found


def _key(layer: int, name: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{name}"
