"""What the hub's client raises, in the user's words."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from nexus_cli.errors import ArtifactError, ResourceError
from nexus_cli.io.hub_errors import explain


def hub_error(kind, status):
    """One of the client's own, made without its HTTP library."""
    error = kind.__new__(kind)
    error.args = ("Client Error.\n\nSee https://hub/docs\n",)
    error.response = SimpleNamespace(status_code=status)
    return error


def caused(outer, cause):
    outer.__cause__ = cause
    return outer


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (hub_error(errors.RepositoryNotFoundError, 401), ArtifactError, "the hub has no o/n, or"),
        (hub_error(errors.RevisionNotFoundError, 404), ArtifactError, "no such revision"),
        (hub_error(errors.GatedRepoError, 403), ResourceError, "asks to be agreed with"),
        (hub_error(errors.HfHubHTTPError, 401), ResourceError, "refuses the token"),
        (hub_error(errors.HfHubHTTPError, 403), ResourceError, "may not do that with the repos"),
        (hub_error(errors.HfHubHTTPError, 429), ResourceError, "too many requests"),
        (hub_error(errors.HfHubHTTPError, 502), ResourceError, "does not answer"),
        (OSError(errno.ENOSPC, "No space"), ResourceError, "the disk is full"),
        (ConnectionError("Request error: HTTP status client error (403 Forbidden), domain: x"),
         ResourceError, "the token may not"),
        (caused(errors.LocalEntryNotFoundError("a\nb"), errors.OfflineModeIsEnabled("c")),
         ResourceError, "HF_HUB_OFFLINE is set"),
        (caused(RuntimeError("while uploading"), TimeoutError("read")),
         ResourceError, "does not answer"),
    ],
)  # fmt: skip
def test_each_has_its_reason_and_a_hint_on_one_line(error, kind, words):
    found = explain(error, "cannot read hf://o/n", "o/n")
    assert type(found) is kind
    assert str(found).startswith("cannot read hf://o/n: ")
    assert words in str(found)
    assert found.hint
    assert "\n" not in f"{found}{found.hint}"


def test_what_is_not_known_is_told_in_its_own_words_on_one_line():
    found = explain(ValueError("- Error: \n" + "word " * 200), "cannot push to o/n", "o/n")
    assert str(found).startswith("cannot push to o/n: - Error: word word")
    assert len(str(found)) < 400
