"""What a filesystem said, as one sentence with what to try next."""

from __future__ import annotations

import os
import re

from nexus_cli.errors import ArtifactError, NexusError, ResourceError
from nexus_cli.io.filesystems import s3_endpoint

HINTS = {
    "file": "check the path and its permissions",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, AWS_REGION, and "
    "AWS_ENDPOINT_URL for a server that is not Amazon's",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run "
    "gcloud auth application-default login",
    "hf": "set HF_TOKEN for a private data set, check the network, and unset HF_HUB_OFFLINE",
}
UNREACHABLE = "check the network"
_SILENT = "{server} does not answer"
# In the order in which they are tried: a token that cannot be had also reads as UNAVAILABLE.
_REASONS = (
    (r"access token", "there are no credentials for it"),
    (r"HTTP status 301|PermanentRedirect", "its bucket is in another region"),
    (
        r"ACCESS_DENIED|SIGNATURE|ACCESS_KEY|TOKEN|HTTP status 40[013]|UNAUTHENTICATED"
        r"|PERMISSION_DENIED|\b40[13]\b",
        "{server} refuses the credentials",
    ),
    (
        r"NETWORK_CONNECTION|UNAVAILABLE|DEADLINE|[Cc]onnect|timed out|SLOW_DOWN",
        _SILENT,
    ),
    (r"OfflineMode|HF_HUB_OFFLINE|offline mode", "HF_HUB_OFFLINE is set"),
)


def explain(error: Exception, shown: str, scheme: str) -> NexusError:
    """The error for the user that stands for ``error``, met while reading ``shown``."""
    if isinstance(error, FileNotFoundError):
        return missing(shown)
    reason = _reason(error, scheme)
    hint = HINTS[scheme]
    if reason == _SILENT:
        hint = UNREACHABLE + (", and AWS_ENDPOINT_URL" if scheme == "s3" else "")
    reason = reason.replace("{server}", _server(scheme))
    return ResourceError(f"cannot read {shown}: {reason}", hint=hint)


def missing(shown: str) -> ArtifactError:
    """There is no such file."""
    return ArtifactError(f"{shown} is not there", hint="check the location, or write it again")


def missing_root(shown: str, scheme: str, root: str) -> ArtifactError:
    """There is no such bucket or data set."""
    if scheme == "hf":
        return ArtifactError(
            f"cannot read {shown}: the hub has no {root}, or hides it from this user",
            hint="check the name (a data set begins with datasets/), and set HF_TOKEN for a "
            "private one",
        )
    server = _server(scheme)
    return ArtifactError(
        f"cannot read {shown}: {server} has no bucket {root}",
        hint="check the name" + (", and AWS_ENDPOINT_URL" if scheme == "s3" else ""),
    )


def _reason(error: Exception, scheme: str) -> str:
    if scheme == "file":
        return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "I/O"
    text = f"{type(error).__name__}: {error}"
    for pattern, reason in _REASONS:
        if re.search(pattern, text):
            return reason
    return " ".join(str(error).split())[:300] or type(error).__name__


def _server(scheme: str) -> str:
    if scheme == "s3":
        return s3_endpoint() or "Amazon S3"
    return "Google Cloud Storage" if scheme == "gs" else "the hub"
