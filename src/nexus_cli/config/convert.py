"""Settings of ``nexus convert``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from nexus_cli.config.base import ConfigModel
from nexus_cli.config.shared import EMBEDDED, AdapterBase

PCA = re.compile(r"pca_top(\d+|K)")
STRATEGIES = ("random", "top1", "top1_average", "top4_average")
START = (
    "pca_stats",
    "init_strategy",
    "start",
    "output_scale",
    "num_shared_experts",
    "shared_intermediate_size",
    "seed",
)


class ConvertConfig(ConfigModel):
    """Which model gets a shared expert, and what that starts from."""

    model: str = Field(
        EMBEDDED,
        description="Model folder to convert, or 'embedded'; or an adapter, to be made a whole "
        "model again.",
    )
    base: AdapterBase = None
    adapter: bool = Field(
        False, description="Write a converted model or a checkpoint as an adapter."
    )
    pca_stats: Path | None = Field(None, description="Chosen experts; by default the pca stage's.")
    init_strategy: str = Field(
        "pca_topK",
        description="pca_topK (all experts in the statistics), pca_topN for the first N of them, "
        "random, top1, top1_average or top4_average.",
    )
    start: Literal["gate", "zero-down", "scaled"] = Field(
        "gate",
        description="gate: closed gate, weights kept. zero-down: open gate, down projection "
        "zero. scaled: gate at --output-scale, which changes the model from the first step.",
    )
    output_scale: float = Field(0.2, gt=0, description="The gate of start 'scaled'.")
    num_shared_experts: int = Field(1, ge=0, le=1, description="0 repacks the model as it is.")
    shared_intermediate_size: int | None = Field(
        None, gt=0, description="Width of the shared expert; by default a routed expert's."
    )
    seed: int = Field(0, ge=0, description="Seed of random weights.")
    copy_shards: bool = Field(False, description="Copy the original shards; do not link them.")
    output: Path | None = Field(None, description="Folder of the converted model.")

    @field_validator("init_strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STRATEGIES and not PCA.fullmatch(value):
            raise ValueError(
                f"init strategy {value!r} is none of pca_topK, {', '.join(STRATEGIES)}"
            )
        return value

    @model_validator(mode="after")
    def _pca_needs_experts(self) -> Self:
        match = PCA.fullmatch(self.init_strategy)
        if match and match[1] == "0":
            raise ValueError("pca_top0 would average no expert")
        return self

    @model_validator(mode="after")
    def _adapter_is_no_new_expert(self) -> Self:
        if not self.adapter:
            return self
        if given := [*self.start_settings, *{"copy_shards"} & self.model_fields_set]:
            raise ValueError(
                f"an adapter holds the shared expert as it is: {', '.join(given)} would have no "
                "effect"
            )
        if self.output is None:
            raise ValueError("--adapter needs the adapter's folder, --output")
        return self

    @property
    def start_settings(self) -> list[str]:
        """The given settings that say what a new shared expert starts from."""
        return [name for name in START if name in self.model_fields_set]

    @property
    def needs_stats(self) -> bool:
        """Whether the strategy reads router statistics."""
        return self.num_shared_experts > 0 and self.init_strategy != "random"

    @property
    def num_experts(self) -> int | None:
        """The N of ``pca_topN``; ``None`` for all experts in the statistics."""
        match = PCA.fullmatch(self.init_strategy)
        return int(match[1]) if match and match[1] != "K" else None
