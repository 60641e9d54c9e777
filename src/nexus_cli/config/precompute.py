"""Settings of ``nexus precompute``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from nexus_cli.config.base import ConfigModel, RuntimeConfig
from nexus_cli.config.shared import EMBEDDED, Dtype, TextData


class PrecomputeConfig(ConfigModel):
    """Which teacher is asked about which text, and how much of its answer is kept."""

    model: str = Field(EMBEDDED, description="The teacher: a model folder, or 'embedded'.")
    data: TextData = Field(default_factory=TextData)
    output: Path | None = Field(None, description="Folder of the teacher store.")
    num_steps: int = Field(1000, gt=0, description="Batches to store.")
    batch_size: int = Field(
        4, gt=0, description="Sequences a batch; training may read any other number."
    )
    top_k: int = Field(32, gt=0, description="Likeliest tokens kept a position; the rest is a sum.")
    precision: Literal["float16", "float32"] = Field(
        "float16", description="Of the kept log-probabilities."
    )
    compression: Literal["zstd", "snappy", "gzip", "none"] = Field(
        "zstd", description="Of the Parquet columns."
    )
    dtype: Dtype = Field("auto", description="The teacher runs in this; auto: bfloat16 on a GPU.")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
