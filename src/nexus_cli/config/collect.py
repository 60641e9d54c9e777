"""Settings of ``nexus collect``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from nexus_cli.config.base import ConfigModel, RuntimeConfig
from nexus_cli.config.shared import EMBEDDED, Dtype, TextData


class CollectRuntime(RuntimeConfig):
    """How the text is run through the model."""

    batch_size: int = Field(
        32,
        gt=0,
        description="Sequences of the longest batch; of shorter texts, as many as hold the same "
        "tokens.",
    )
    checkpoint_seconds: float = Field(
        60.0, ge=0, description="Save what was counted this often; a killed run continues there."
    )


class CollectConfig(ConfigModel):
    """Which text shows how the model routes, and how much of it."""

    model: str = Field(EMBEDDED, description="Model folder, or 'embedded'.")
    data: TextData = Field(default_factory=TextData)
    output: Path | None = Field(None, description="Where router_probs.npz goes.")
    target_tokens: int = Field(100_000, gt=0, description="Tokens to run through the model.")
    max_candidates: int = Field(
        10_000, gt=0, description="Texts to choose from, shared over the sources by weight."
    )
    max_seq_length: int = Field(512, gt=1, description="Tokens a text; longer ones are cut up.")
    min_seq_length: int = Field(10, gt=1, description="Shorter texts are left out.")
    coverage_exponent: float = Field(
        0.5,
        ge=0,
        le=1,
        description="0: all token types count alike when text is chosen; 1: by their frequency.",
    )
    batch_select: int = Field(
        1,
        gt=0,
        description="Texts taken before their gains are computed again; more is faster and covers "
        "less.",
    )
    reservoir: int = Field(
        4096, ge=0, description="Tokens whose probabilities are kept as they are, for plots."
    )
    units: bool = Field(
        True,
        description="Sum what every hidden unit of every expert contributes, which the init "
        "strategy neurons needs: 8 bytes a unit in memory and in the file.",
    )
    seed: int = Field(0, ge=0, description="Seed of ties in the choice, and of the reservoir.")
    dtype: Dtype = Field("auto", description="The model runs in this; auto: bfloat16 on a GPU.")
    runtime: CollectRuntime = Field(default_factory=CollectRuntime)
