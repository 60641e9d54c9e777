"""Settings of ``nexus convert``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from nexus_cli.config.base import ConfigModel
from nexus_cli.config.shared import EMBEDDED, AdapterBase
from nexus_cli.io.uri import REPOSITORY

# Of chosen experts: all that the statistics name, or the first N.
SELECTED = re.compile(r"(?:pca_top(\d+|K)|(?P<units>neurons(?:_weighted)?)(?:_top(\d+|K))?)")
STRATEGIES = ("random", "top1", "top1_average", "top4_average")
NAMES = ("pca_topK", "neurons", "neurons_weighted", *STRATEGIES)
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
        description="Model folder to convert, or 'embedded'; or an adapter (a folder, or "
        "hf://OWNER/NAME on the hub), to be made a whole model again.",
    )
    base: AdapterBase = None
    adapter: bool = Field(
        False, description="Write a converted model or a checkpoint as an adapter."
    )
    push_to_hub: str | None = Field(
        None,
        exclude=True,  # says where, never what: it leaves no stage stale
        description="Repository OWNER/NAME of the hub that gets the adapter; made if it is new.",
    )
    public: bool = Field(
        False,
        exclude=True,
        description="The repository is public; without it a new one is private, and a public one "
        "is refused.",
    )
    pca_stats: Path | None = Field(None, description="Chosen experts; by default the pca stage's.")
    init_strategy: str = Field(
        "neurons_weighted_top8",
        description="neurons: whole hidden units, those that contribute most. neurons_weighted: "
        "the same, each as strong as its expert is used. pca_topK: the mean of experts. They take "
        "all experts in the statistics, with _topN the first N, which every layer must name; only "
        "the default makes do with fewer than 8. Or random, top1, top1_average, top4_average.",
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
        if value not in STRATEGIES and not SELECTED.fullmatch(value):
            raise ValueError(f"init strategy {value!r} is none of {', '.join(NAMES)}")
        return value

    @model_validator(mode="after")
    def _pca_needs_experts(self) -> Self:
        if self.num_experts == 0:
            raise ValueError(f"{self.init_strategy} would take no expert")
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
        if self.output is None and self.push_to_hub is None:
            raise ValueError("--adapter needs the adapter's folder, --output")
        return self

    @model_validator(mode="after")
    def _pushes_an_adapter(self) -> Self:
        if self.push_to_hub is None:
            if self.public:
                raise ValueError("--public says how to push: give --push-to-hub")
            return self
        if not self.adapter:
            raise ValueError("--push-to-hub pushes adapters: give --adapter too")
        if not REPOSITORY.fullmatch(self.push_to_hub):
            raise ValueError(f"--push-to-hub takes OWNER/NAME, not {self.push_to_hub!r}")
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
    def needs_units(self) -> bool:
        """Whether the strategy reads what hidden units contribute."""
        match = SELECTED.fullmatch(self.init_strategy)
        return self.num_shared_experts > 0 and match is not None and match["units"] is not None

    @property
    def num_experts(self) -> int | None:
        """The N of ``pca_topN`` or ``neurons_topN``; ``None`` for all that the statistics name."""
        match = SELECTED.fullmatch(self.init_strategy)
        count = None if match is None else match[1] or match[3]
        return None if count in (None, "K") else int(count)
