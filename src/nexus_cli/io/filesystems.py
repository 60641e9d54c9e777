"""The filesystem of each scheme, as pyarrow opens it, with limits on how long it may wait."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from nexus_cli.errors import ConfigError, ResourceError
from nexus_cli.io.uri import Place

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 10.0  # without a byte, before a request counts as failed
S3_ATTEMPTS = 4  # of a request; the waits between them add up to 7 s at most
GCS_SECONDS = 20.0  # in which a request is tried again
DEFAULT_REGION = "us-east-1"  # what servers other than Amazon's take unless told otherwise
_ENDPOINT = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGION = ("AWS_REGION", "AWS_DEFAULT_REGION")


def open_filesystem(place: Place) -> Any:
    """The ``pyarrow.fs.FileSystem`` that holds ``place``.

    Raises:
        ConfigError: the endpoint in the environment is no URL.
        ResourceError: a package is missing.
        OSError: no server says in which region the bucket is.
    """
    openers = {"s3": lambda: _s3(place.root), "gs": _gcs, "hf": _hub, "file": fs.LocalFileSystem}
    try:
        return openers[place.scheme]()
    except ImportError as error:
        raise ResourceError(
            f"this pyarrow was built without {place.scheme}://",
            hint="install the one from PyPI: pip install --force-reinstall pyarrow",
        ) from error


def failures(scheme: str) -> tuple[type[Exception], ...]:
    """What reading from a filesystem of ``scheme`` may raise, besides a mistake of this program."""
    if scheme == "gs":
        return (OSError, pa.ArrowException)  # the latter where it has no credentials
    if scheme != "hf":
        return (OSError,)
    try:
        from huggingface_hub import errors  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError:
        return (OSError,)  # opening the filesystem says what is missing
    # The bases hold the HTTP library's own error, which a refused connection raises. The two
    # others are of a malformed name; versions of the hub's package differ in which they have.
    names = [name for name in ("HFValidationError", "HfUriError") if hasattr(errors, name)]
    malformed = (getattr(errors, name) for name in names)
    return (OSError, *errors.HfHubHTTPError.__bases__, *malformed)


def s3_endpoint() -> str | None:
    """URL of the server that the environment names instead of Amazon's, if it names one."""
    return _environment(_ENDPOINT)


def _s3(bucket: str) -> Any:
    endpoint, region = s3_endpoint(), _environment(_REGION)
    where: dict[str, str] = {}
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(
                f"{_set_name(_ENDPOINT)} is {endpoint}, which is no URL",
                hint="write the scheme too, for instance http://127.0.0.1:9000",
            )
        # With an endpoint, pyarrow puts the bucket into the path, not into the host's name.
        where["scheme"] = parts.scheme
        where["endpoint_override"] = (parts.netloc + parts.path).rstrip("/")
        region = region or DEFAULT_REGION
    return fs.S3FileSystem(
        region=region or fs.resolve_s3_region(bucket),
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENCE_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        **where,
    )


def _gcs() -> Any:
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=GCS_SECONDS))


def _hub() -> Any:
    try:
        from huggingface_hub import HfFileSystem  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"reading hf:// needs the package {error.name}",
            hint="install the extra: pip install 'nexus-cli[hub]'",
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem()))


def _environment(names: tuple[str, ...]) -> str | None:
    """The first variable that is set and not empty."""
    return next((value for name in names if (value := os.environ.get(name))), None)


def _set_name(names: tuple[str, ...]) -> str:
    return next(name for name in names if os.environ.get(name))
