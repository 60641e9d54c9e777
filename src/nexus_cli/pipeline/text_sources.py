"""The sources of a config, found and pinned, and their errors given exit codes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from nexus_cli.config.shared import TextData
from nexus_cli.core.data.assemble import shares_of
from nexus_cli.core.data.errors import DataError, MissingTextError, UnknownSourceError
from nexus_cli.core.data.reader import SourceSpec
from nexus_cli.core.data.sources import HubText, resolve_source
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError

Split = Literal["train", "held-out"]
DATA_DIR = "NEXUS_DATA_DIR"


@contextmanager
def translated() -> Iterator[None]:
    """Turn what is wrong with text into the error family that has exit codes."""
    try:
        yield
    except UnknownSourceError as error:
        raise ConfigError(str(error), hint=error.hint) from error
    except MissingTextError as error:
        raise ResourceError(str(error), hint=error.hint) from error
    except DataError as error:
        raise ArtifactError(str(error), hint=error.hint) from error


def find_sources(data: TextData, default_split: Split) -> list[SourceSpec]:
    """Resolve every source of a config, reading nothing.

    Args:
        data: the sources.
        default_split: what the split ``auto`` means to the caller.

    Raises:
        DataError: a name is not known, or its text is not there.
    """
    named = os.environ.get(DATA_DIR)
    data_dir = data.data_dir or (Path(named) if named else None)
    specs = []
    for source in data.sources:
        split = default_split if source.split == "auto" else source.split
        specs.append(
            SourceSpec(
                name=source.name,
                text=resolve_source(source.name, split, data_dir),
                split=split,
                weight=source.weight,
                held_out=data.held_out,
                seed=data.seed,
                max_documents=data.max_documents,
            )
        )
    return specs


def limited(specs: list[SourceSpec], max_documents: int | None) -> list[SourceSpec]:
    """Share a limit on documents among the sources by weight; each keeps at least one."""
    if max_documents is None:
        return specs
    shares = (max(share, 1) for share in shares_of(specs, max_documents))
    limits = (
        share if spec.max_documents is None else min(share, spec.max_documents)
        for spec, share in zip(specs, shares, strict=True)
    )
    return [replace(spec, max_documents=limit) for spec, limit in zip(specs, limits, strict=True)]


def pinned(specs: list[SourceSpec]) -> list[SourceSpec]:
    """Fix the version of what is streamed, so that one run reads one version.

    Raises:
        MissingTextError: the packages for streaming are not installed, or the hub not reachable.
    """
    if not any(isinstance(spec.text, HubText) for spec in specs):
        return specs
    try:
        from nexus_cli.core.data import hub  # noqa: PLC0415 (datasets is an extra)
    except ModuleNotFoundError as error:
        names = ", ".join(spec.name for spec in specs if isinstance(spec.text, HubText))
        raise MissingTextError(
            f"no local copy of {names}, and streaming from the hub needs the package {error.name}",
            "Give text with --data PATH, name a folder of local copies with --data-dir, "
            "or install the extra: pip install 'nexus-cli[hub]'",
        ) from error
    return [
        replace(spec, revision=hub.current_revision(spec.text))
        if isinstance(spec.text, HubText)
        else spec
        for spec in specs
    ]
