"""Settings of ``nexus plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from nexus_cli.config.base import ConfigModel


class PlotConfig(ConfigModel):
    """Which runs are drawn, and how smooth."""

    log_file: tuple[str, ...] = Field(
        (),
        description="A run's folder, metrics.jsonl or training.log, or - for stdin; repeat it "
        "to compare runs. By default the workspace's trainings.",
    )
    smooth_window: int = Field(
        50, gt=0, description="Curves are means over this many steps, at most a fifth of a run."
    )
    report: Path | None = Field(
        None, description="report.json of nexus validate; by default the workspace's, if any."
    )
    output: Path | None = Field(None, description="Folder of the figures and report.html.")

    @field_validator("log_file", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("log_file")
    @classmethod
    def _stdin_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value.count("-") > 1:
            raise ValueError("stdin (-) can be read once")
        return value
