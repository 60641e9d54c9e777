"""What models on disk will take of a device: the sums of dry runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nexus_cli.core.model.gpt_oss.engine.attach import CHUNKS, Engine
from nexus_cli.core.model.gpt_oss.engine.memory import BF16, EVERYTHING
from nexus_cli.core.model.gpt_oss.engine.policy import Backend
from nexus_cli.core.model.gpt_oss.loading import load_config, runs_engine
from nexus_cli.pipeline.capacity import forward_bytes, weight_bytes


class EngineOnDisk(Engine):
    """The engine of a model that is not loaded: it plans and counts as the real one would.

    Args:
        model: a model folder; its config alone is read.
        backend: of the experts.
    """

    def __init__(self, model: Path, backend: Backend) -> None:
        config: Any = load_config(model)
        absent: list[Any] = [None] * config.num_hidden_layers
        super().__init__(config, absent, absent, absent, backend)
        self._model = model

    def decode(self, count: int) -> None:
        """Nothing is here to decode; the plan says how many layers would be."""

    def buffer_bytes(self, tokens: int) -> int:
        """The buffer that layers are decoded into, where the backend has one."""
        fused = EngineOnDisk(self._model, "fused")
        return self.transient_bytes(tokens) - fused.transient_bytes(tokens)

    def least_bytes(self, tokens: int) -> int:
        """The layers' inputs, less what the peak of a layer can save: the least of any plan."""
        whole = self.transient_bytes(tokens)
        self._workspace.chunk = -(-self._config.num_local_experts // CHUNKS)
        saved = whole - self.transient_bytes(tokens)
        self._workspace.chunk = None
        return len(self._layers) * self.layer_bytes.input * tokens - saved

    def forward_bytes(self, tokens: int) -> int:
        """Peak of a forward pass that keeps nothing, the decoding buffer included.

        Until a layer ends it holds all that a backward pass could ask for; beside that its normed
        input and its output, and of every routed row the activation and the expert's output.
        """
        config = self._config
        beside = 2 * config.hidden_size
        beside += config.num_experts_per_tok * (config.intermediate_size + config.hidden_size)
        a_token = self.layer_bytes.kept(EVERYTHING) + BF16 * beside
        return int(tokens * a_token) + self.buffer_bytes(tokens)


@dataclass(frozen=True)
class Placement:
    """How a stage loads its models.

    Attributes:
        device: that they run on.
        dtype: of all but the packed experts.
        backend: of the experts, where the engine runs.
    """

    device: torch.device
    dtype: torch.dtype
    backend: Backend = "auto"

    @property
    def has_engine(self) -> bool:
        """Whether the layers run through the engine."""
        return runs_engine(self.device, self.dtype)

    @property
    def decodes_all(self) -> bool:
        """Whether experts are decoded as they are loaded."""
        return self.has_engine and self.backend == "bf16"

    def weight_bytes(self, model: Path) -> int:
        """Memory of a model's weights."""
        return weight_bytes(model, self.dtype, decoded=self.decodes_all)

    def forward_bytes(self, model: Path, sequences: int, length: int) -> int:
        """Peak of a forward pass beside the weights; without the engine an estimate."""
        if self.has_engine:
            return EngineOnDisk(model, self.backend).forward_bytes(sequences * length)
        return forward_bytes(model, sequences, length, self.dtype)

    def buffer_bytes(self, model: Path, tokens: int) -> int:
        """What a model holds between forward passes of ``tokens`` beside its weights."""
        return EngineOnDisk(model, self.backend).buffer_bytes(tokens) if self.has_engine else 0
