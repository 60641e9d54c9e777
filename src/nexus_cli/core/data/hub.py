"""Streaming from the hub; imported only when a source needs it, for ``datasets`` is an extra."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from nexus_cli.core.data.errors import MissingTextError
from nexus_cli.core.data.sources import HubText

SECONDS = 15.0  # for the first answer; without a network this fails at once
# The bases are the HTTP library's own error, which a refused connection raises, and OSError.
FAILURES: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    datasets.exceptions.DatasetsError,
    ValueError,
)


def current_revision(source: HubText) -> str:
    """The commit that the data set is at, so that all that is read is of one version.

    Raises:
        MissingTextError: the hub cannot be reached, or has no such data set for this user.
    """
    try:
        info = HfApi().dataset_info(source.repository, timeout=SECONDS)
    except FAILURES as error:
        raise _missing(source, error) from error
    return str(info.sha)


def stream_rows(source: HubText, revision: str) -> Iterator[tuple[int, Any]]:
    """Yield the row number, counted from 1, and the row, as they come over the network.

    Raises:
        MissingTextError: the data set has no such configuration or split, or the network failed.
    """
    try:
        rows = datasets.load_dataset(
            source.repository,
            source.config,
            split=source.split,
            revision=revision,
            streaming=True,
        )
        yield from enumerate(rows, start=1)
    except FAILURES as error:
        raise _missing(source, error) from error


def _missing(source: HubText, error: Exception) -> MissingTextError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return MissingTextError(
        f"cannot stream {source.repository} ({source.split}) from the hub: {reason}",
        "Give text with --data PATH, or a folder of local copies with --data-dir.",
    )
