"""``report.json`` (``nexus.report/1``): what ``nexus validate`` found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_cli.errors import ArtifactError
from nexus_cli.io.atomic import write_atomic

FORMAT = "nexus.report/1"
FILENAME = "report.json"
PARTS = ("checks", "settings", "sets", "summary")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report; a number that is not finite becomes ``null``."""
    write_atomic(path, to_json(report).encode())


def to_json(report: Mapping[str, Any]) -> str:
    """The report as JSON text that every reader accepts."""
    return json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"


def read_report(path: Path) -> dict[str, Any]:
    """The report at ``path``.

    Raises:
        ArtifactError: If it is missing, damaged, or of another format.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"cannot read the report {path}: {error.strerror}", hint="nexus validate writes it"
        ) from error
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not valid JSON: {error}", hint="run nexus validate again"
        ) from error
    if (
        not isinstance(report, dict)
        or report.get("format") != FORMAT
        or any(part not in report for part in PARTS)
    ):
        raise ArtifactError(f"{path} is not a {FORMAT} file", hint="nexus validate writes one")
    return report


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
