"""Settings that name a folder here or in an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from nexus_cli.errors import ConfigError
from nexus_cli.io.uri import parse


def _spelled(value: Any) -> Any:
    """A local path with ``~`` expanded, or a URI, of which pathlib would drop a slash."""
    if not isinstance(value, str | Path):
        return value
    try:
        return str(parse(value))
    except ConfigError as error:
        raise ValueError(f"{error}; {error.hint}") from error


FolderOrUri = Annotated[str, BeforeValidator(_spelled)]
