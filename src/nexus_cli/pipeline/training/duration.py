"""``--dry-run``: how long a run will take, where an earlier one in its folder has measured it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from nexus_cli.core.train.estimate import ENOUGH, WARM_UP, shown
from nexus_cli.io.metrics import FILENAME, read_metrics
from nexus_cli.pipeline.training.request import Request

BEGINNINGS = ("start", "resume")


def describe_duration(request: Request, directory: Path, device: torch.device) -> str:
    """How long all steps of the run will take, or when that will be known.

    Args:
        request: the run.
        directory: its folder; a ``metrics.jsonl`` of a run before is read.
        device: the student's; what another device measured is of no use.

    Raises:
        ArtifactError: the metrics are damaged.
    """
    path = directory / FILENAME
    rates = measured_rates(read_metrics(path), str(device)) if path.is_file() else []
    if not rates:
        return f"not known yet: the run's log says it after {ENOUGH} steps"
    rate = statistics.median(rates)
    positions = request.max_steps * request.sequences_per_step * request.seq_len
    return (
        f"{shown(positions / rate)} in steps, at the {rate:,.0f} tokens/s that the run in this "
        "folder measured; evaluations and checkpoints come on top"
    )


def measured_rates(records: Iterable[Mapping[str, Any]], device: str) -> list[float]:
    """Tokens a second of every step on ``device``, but for the warm-up of each process.

    Args:
        records: of ``metrics.jsonl``, in order.
        device: as the ``start`` and ``resume`` events name it.
    """
    rates: list[float] = []
    warming, same = 0, False
    for record in records:
        if record.get("event") in BEGINNINGS:
            warming, same = WARM_UP, record.get("device") == device
        rate = record.get("tokens_per_second")
        if rate is None:
            continue
        if same and not warming:
            rates.append(float(rate))
        warming = max(0, warming - 1)
    return rates
