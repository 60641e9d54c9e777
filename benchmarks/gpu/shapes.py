"""Shapes of models and batches."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A GPT-OSS model's shape.

    Attributes:
        layers: of the whole model.
        experts: in each layer.
        tiny: small in every direction, to try a benchmark out on a CPU.
    """

    layers: int
    experts: int
    tiny: bool = False

    def config(self, layers: int) -> dict[str, Any]:
        """Arguments of the config class for a model with so many layers."""
        values: dict[str, Any] = {"num_hidden_layers": layers, "num_local_experts": self.experts}
        if self.tiny:
            values |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
            values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
        return values


MODELS = {
    "20b": ModelShape(24, 32),
    "120b": ModelShape(36, 128),
    "tiny": ModelShape(2, 8, tiny=True),
}


@dataclass(frozen=True)
class BatchShape:
    """``batch`` sequences of ``length`` tokens."""

    batch: int
    length: int

    @classmethod
    def parse(cls, text: str) -> BatchShape:
        """From ``16x1024``."""
        batch, _, length = text.partition("x")
        try:
            shape = cls(int(batch), int(length))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text} is not like 16x1024") from error
        if min(shape.batch, shape.length) < 1:
            raise argparse.ArgumentTypeError(f"{text} has no token")
        return shape

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.batch * self.length

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"
