"""What the hub's client said, as one sentence with what to try next."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from nexus_cli.errors import ArtifactError, NexusError, ResourceError

TOKEN = "run: hf auth login, or set HF_TOKEN"
_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")  # of what moves large files
_CHARACTERS = 300  # of a message that is not known here
# Names of errors, with HTTP404 and ENOSPC for what a number tells; what failed, and what to do.
_KNOWN: tuple[tuple[str, type[NexusError], str, str], ...] = (
    ("HFValidationError|HfUriError", ArtifactError, "that names no repository", "write OWNER/NAME"),
    ("ENOSPC|EDQUOT", ResourceError, "the disk is full", "free some of it, or set HF_HOME"),
    (
        "OfflineModeIsEnabled",
        ResourceError,
        "HF_HUB_OFFLINE is set, and the hub's cache does not hold it",
        "unset it",
    ),
    (
        "RevisionNotFoundError|RevisionResolutionError",
        ArtifactError,
        "there is no such revision",
        "check what follows the @",
    ),
    (
        "GatedRepoError",
        ResourceError,
        "its owner asks to be agreed with first",
        f"accept the terms on the page of {{name}}, and {TOKEN}",
    ),
    (
        "RepositoryNotFoundError|DisabledRepoError|HTTP404",
        ArtifactError,
        "the hub has no {name}, or hides it from this user",
        f"check the name; for a private one {TOKEN}",
    ),
    ("LocalTokenNotFoundError|HTTP401", ResourceError, "the hub refuses the token", TOKEN),
    (
        "HTTP403",
        ResourceError,
        "the token may not do that with the repositories of {owner}",
        "use a token that may write there, or another owner",
    ),
    (
        "HTTP402|HTTP413|HTTP507",
        ResourceError,
        "the hub has no room left for {owner}",
        "look at the account's plan",
    ),
    ("HTTP429", ResourceError, "too many requests for now", "try again in some minutes"),
    (
        r"\w*(Connect|Timeout|Proxy|Network|Protocol|Read|Write)\w*(Error|Timeout|Exception)"
        r"|HTTP5\d\d",
        ResourceError,
        "the hub does not answer",
        "check the network, and try again",
    ),
)


def explain(error: BaseException, what: str, repository: str) -> NexusError:
    """The error for the user that stands for ``error``, of any version of the client.

    The client wraps one error in another: the first of the chain that is known here tells.

    Args:
        error: as the client raised it.
        what: cannot be done, as the sentence's beginning.
        repository: ``owner/name``.
    """
    words = {"name": repository, "owner": repository.partition("/")[0]}
    for cause in _chain(error):
        for pattern, kind, reason, hint in _KNOWN:
            if any(re.fullmatch(pattern, name) for name in _names(cause)):
                return kind(f"{what}: {reason.format(**words)}", hint=hint.format(**words))
    said = " ".join(str(error).split())[:_CHARACTERS] or type(error).__name__
    return ResourceError(f"{what}: {said}", hint="see what the hub says, and try again")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _names(error: BaseException) -> Iterator[str]:
    yield type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        yield errno.errorcode.get(error.errno, "")
    response = getattr(error, "response", None)
    if (status := getattr(response, "status_code", None)) is not None:
        yield f"HTTP{status}"
    if told := _STATUS.search(str(error)):
        yield f"HTTP{told[1]}"
