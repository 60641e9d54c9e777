"""Settings of ``nexus precompute``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from nexus_cli.config.base import ConfigModel, RuntimeConfig
from nexus_cli.config.shared import EMBEDDED, Dtype, TextData

REMOTE = re.compile(r"[a-z0-9+]{2,}:/")  # pathlib has taken one of its slashes


class PrecomputeConfig(ConfigModel):
    """Which teacher is asked about which text, and how much of its answer is kept."""

    model: str = Field(EMBEDDED, description="The teacher: a model folder, or 'embedded'.")
    data: TextData = Field(default_factory=TextData)
    output: Path | None = Field(None, description="Folder of the teacher store.")
    num_steps: int = Field(1000, gt=0, description="Batches to store.")
    batch_size: int = Field(
        4, gt=0, description="Sequences a batch; training may read any other number."
    )
    top_k: int = Field(32, gt=0, description="Most tokens kept a position; the rest is a sum.")
    top_p: float = Field(
        0.98,
        gt=0,
        le=1,
        description="Keep the likeliest tokens up to this mass, and no more; 1 keeps top_k always.",
    )
    min_k: int = Field(4, gt=0, description="Fewest tokens kept a position, at most top_k.")
    values: Literal["codes", "float32"] = Field(
        "codes",
        description="How log-probabilities are kept: codes of 1/16 nat, or float32 for exact "
        "comparisons.",
    )
    tail_samples: int = Field(
        0, ge=0, le=64, description="Tokens drawn from the rest of the mass at each position."
    )
    experts: bool = Field(
        False, description="Keep which experts every layer chose, to compare routing with."
    )
    compression: Literal["zstd", "snappy", "gzip", "none"] = Field(
        "zstd", description="Of the Parquet columns."
    )
    dtype: Dtype = Field("auto", description="The teacher runs in this; auto: bfloat16 on a GPU.")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @field_validator("output")
    @classmethod
    def _here(cls, value: Path | None) -> Path | None:
        if value is not None and REMOTE.match(str(value)):
            raise ValueError(
                f"{value} is no folder of this machine: write the store here, copy it there, and "
                "read it with train-offline from there"
            )
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_k > self.top_k and "min_k" in self.model_fields_set:
            raise ValueError(f"min_k ({self.min_k}) is above top_k ({self.top_k})")
        return self
