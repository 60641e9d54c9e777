"""Settings of ``nexus validate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from nexus_cli.config.base import ConfigModel, RuntimeConfig
from nexus_cli.config.places import FolderOrUri
from nexus_cli.config.shared import AdapterBase, DataSource, Dtype, TextData

SELF = "self"
DOMAIN = ("nemotron-code", "nemotron-math", "nemotron-tool-calling")
GENERAL = ("nemotron-general",)


def _text(names: tuple[str, ...]) -> TextData:
    return TextData(sources=tuple(DataSource(name=name) for name in names))


class ValidateConfig(ConfigModel):
    """What is judged, against what, and on which text."""

    checkpoint: str | None = Field(
        None,
        description="Model folder, checkpoint, adapter or hf://OWNER/ADAPTER; by default the "
        "workspace's newest training, else its converted model.",
    )
    base: AdapterBase = None
    baseline: str | None = Field(
        None,
        description="Model to compare with, or 'self' for the same weights with the shared "
        "experts off; by default the base it was converted from.",
    )
    store: FolderOrUri | None = Field(
        None, description="Check this teacher store instead of a model; --model is its teacher."
    )
    store_rows: int = Field(
        32, ge=0, description="Sequences of a store that its teacher is asked about again."
    )
    compute_perplexity: bool = Field(
        True, description="Score held-out text: perplexity, KL, agreement."
    )
    domain: TextData = Field(
        default_factory=lambda: _text(DOMAIN), description="Text of the domain that was learned."
    )
    general: TextData | None = Field(
        default_factory=lambda: _text(GENERAL),
        description="Text on which nothing should be lost; null to leave it out.",
    )
    window: int = Field(2048, gt=1, description="Tokens that a prediction may look back on.")
    stride: int = Field(512, gt=0, description="Tokens that each further window scores.")
    score_end: bool = Field(
        True, description="Count the end-of-text token of plain text (lm-eval does not)."
    )
    max_documents: int = Field(512, gt=0, description="Documents read for each of the two texts.")
    max_degradation: float | None = Field(
        None, ge=0, description="Fail if general perplexity rises by more than this percentage."
    )
    resamples: int = Field(2000, gt=0, description="Bootstrap resamples of the documents.")
    level: float = Field(0.95, gt=0, lt=1, description="Coverage of the intervals.")
    seed: int = Field(0, ge=0, description="Seed of the resampling and of the probe tokens.")
    dtype: Dtype = Field("auto", description="auto (bfloat16 on a GPU), float32 or bfloat16.")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    output: Path | None = Field(None, description="File of the report, JSON.")

    @field_validator("domain", "general", mode="before")
    @classmethod
    def _names_are_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Names alone are text; settings without names are of the default text."""
        if isinstance(value, (str, list, tuple)):
            return {"sources": value}
        if isinstance(value, Mapping) and "sources" not in value:
            return {"sources": DOMAIN if info.field_name == "domain" else GENERAL, **value}
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.stride > self.window:
            raise ValueError(f"stride ({self.stride}) above window ({self.window}) would skip text")
        if self.max_degradation is not None and (
            self.general is None or not self.compute_perplexity
        ):
            raise ValueError("max_degradation needs general text and compute_perplexity")
        if self.store is not None and (self.baseline or self.base):
            raise ValueError("a teacher store is checked against its teacher: no baseline, no base")
        return self
