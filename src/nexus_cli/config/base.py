"""What every config model shares."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
ExpertsBackend = Literal["auto", "torch", "dequant", "fused", "bf16"]


class ConfigModel(BaseModel):
    """Frozen, and an unknown key is an error: a typo must not fall back to a default.

    Attributes:
        alternatives: groups of settings that say one thing in several ways.
    """

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()

    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=True, protected_namespaces=()
    )


def check_device(name: str) -> str:
    """A validator: the spelling of a device; whether it is there is asked when it is used."""
    if not DEVICE.fullmatch(name):
        raise ValueError(f"a device is auto, cpu, cuda or cuda:N, not {name!r}")
    return name


class RuntimeConfig(ConfigModel):
    """How a stage runs, never what it computes; left out of the stage's fingerprint."""

    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda or cuda:N.")
    batch_size: int = Field(8, gt=0, description="Sequences a forward pass.")
    num_processes: int = Field(1, gt=0, description="CPU workers that read and tokenise text.")
    experts_backend: ExpertsBackend = Field(
        "auto",
        description="Products with packed experts on a GPU: torch, dequant, fused, bf16; "
        "auto: by rows an expert.",
    )

    _device = field_validator("device")(check_device)
