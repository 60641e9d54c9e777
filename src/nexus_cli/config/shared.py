"""Blocks that several stages use: text, its sources, and the weights of their losses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nexus_cli.config.base import ConfigModel

EMBEDDED = "embedded"
NEMOTRON = ("nemotron-general", "nemotron-code", "nemotron-math", "nemotron-tool-calling")
SPLITS = ("auto", "train", "held-out", "all")
Dtype = Literal["auto", "float32", "bfloat16"]
AdapterBase = Annotated[
    str | None,
    Field(
        description="Model that an adapter was made from; by default where the adapter "
        "says, or in the hub's cache."
    ),
]


class LossWeights(ConfigModel):
    """What the text of one source teaches; each term is a mean over counted tokens."""

    ce: float = Field(1.0, ge=0, description="Cross entropy with the text itself.")
    kd: float = Field(
        0.1,
        ge=0,
        description="Divergence from the teacher over the vocabulary: the forward KL, or what "
        "train.loss.divergence says.",
    )
    router: float = Field(0.0, ge=0, description="KL between the routers.")


class DataSource(ConfigModel):
    """One source of text, and its share of the mixture."""

    name: str = Field(min_length=1, description="A known name, a path, or a hub id org/name.")
    weight: float = Field(1.0, gt=0, description="Share of the mixture, relative to the others.")
    split: Literal["auto", "train", "held-out", "all"] = Field(
        "auto", description="Part of the source; auto: train to learn, held-out to judge."
    )
    loss: LossWeights | None = Field(None, description="Loss weights of this source's tokens.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """``NAME``, ``NAME@SPLIT``, ``NAME:WEIGHT`` or ``NAME@SPLIT:WEIGHT``."""
        if not isinstance(value, str):
            return value
        name, weight = value.strip(), 1.0
        head, colon, tail = name.rpartition(":")
        if colon and _is_number(tail):
            name, weight = head, float(tail)
        head, at, tail = name.rpartition("@")
        if at and tail in SPLITS:
            return {"name": head, "split": tail, "weight": weight}
        return {"name": name, "weight": weight}


class TextData(ConfigModel):
    """A mixture of text sources, cut into sequences."""

    sources: tuple[DataSource, ...] = Field(
        default_factory=lambda: tuple(DataSource(name=name) for name in NEMOTRON),
        min_length=1,
        description="Known names, paths and hub ids, with weights: 'a:0.7,b:0.3'.",
    )
    data_dir: Path | None = Field(
        None, description="Folder with local copies of the named data sets (or NEXUS_DATA_DIR)."
    )
    seq_len: int = Field(1024, gt=1, description="Tokens a sequence.")
    held_out: float = Field(0.02, gt=0, lt=1, description="Share of each source held out.")
    max_documents: int | None = Field(None, gt=0, description="Read at most this many a source.")
    seed: int = Field(0, ge=0, description="Seed of the order in which text is read.")

    @field_validator("sources", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part.strip()]
        return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
