"""Every failure a user can cause or fix, and the exit code it ends the process with.

NexusError           1   (never raised itself; an unexpected exception also exits with 1)
+-- ConfigError      2   a flag or a YAML value is wrong
+-- WorkspaceError   3   an input stage is missing, stale or locked
+-- ArtifactError    4   a file on disk is corrupt, or of another schema or model
+-- ResourceError    5   a device, memory, disk space or text is not there
+-- CheckFailed      6   `nexus validate` ran, and a threshold failed
Interrupted        130   Ctrl-C or SIGTERM, after the work was saved
"""

from __future__ import annotations


class NexusError(Exception):
    """Base of the family. ``hint`` is the next thing to try, as one sentence."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(NexusError):
    """A flag or a YAML value is wrong."""

    exit_code = 2


class WorkspaceError(NexusError):
    """An input stage is missing, stale or locked."""

    exit_code = 3


class ArtifactError(NexusError):
    """A file on disk is corrupt, or of another schema or model."""

    exit_code = 4


class ResourceError(NexusError):
    """A device, memory, disk space or text is not there."""

    exit_code = 5


class CheckFailed(NexusError):
    """Validation ran to its end, and a threshold failed."""

    exit_code = 6


class Interrupted(NexusError):
    """The user or the machine asked the process to end; its work is saved."""

    exit_code = 130
