"""Adapters on the hub, through its own client: ``hf://owner/name@revision`` and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from nexus_cli import __version__
from nexus_cli.errors import ArtifactError, ConfigError, NexusError, ResourceError
from nexus_cli.io import model_dir
from nexus_cli.io.adapter_dir import TENSORS
from nexus_cli.io.hub_errors import explain
from nexus_cli.io.model_dir import ADAPTER
from nexus_cli.io.uri import REPOSITORY, REVISION

_URI = re.compile(r"hf://([^@]+?)/?(?:@(.+))?", re.IGNORECASE)
CARD = "README.md"
LIBRARY = {"library_name": "nexus-cli", "library_version": __version__}
LEGAL = [f"{n}{end}" for n in ("LICENSE", "NOTICE", "USAGE_POLICY") for end in ("", ".md", ".txt")]
# Nothing else is ever pushed or downloaded: no code, no pickle. These are whole names, since in the
# client's patterns a star stands for slashes too.
SHARED = [ADAPTER, TENSORS, CARD, *LEGAL]


@dataclass(frozen=True)
class Repository:
    """A model repository of the hub.

    Attributes:
        name: ``owner/name``.
        revision: a branch, a tag or a commit; ``None`` for the main branch.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        """As :func:`parse_repository` reads it."""
        return f"hf://{self.name}" + (f"@{self.revision}" if self.revision else "")


def is_uri(name: str | Path) -> bool:
    """Whether ``name`` is meant as a place on the hub. Nothing is asked or read."""
    return str(name).strip().lower().startswith("hf:/")


def parse_repository(uri: str | Path) -> Repository:
    """Take ``hf://owner/name`` or ``hf://owner/name@revision`` apart.

    Raises:
        ConfigError: it is spelled otherwise.
    """
    found = _URI.fullmatch(str(uri).strip())
    name, revision = (found[1], unquote(found[2] or "")) if found else ("", "")
    if not REPOSITORY.fullmatch(name) or not (revision == "" or REVISION.fullmatch(revision)):
        raise ConfigError(
            f"{uri} names no adapter on the hub", hint="write hf://OWNER/NAME or that and @REVISION"
        )
    return Repository(name, revision or None)


def pull(repository: Repository) -> Path:
    """The adapter's files in the hub's own cache, downloaded if they are not there yet.

    Offline it is what the cache holds. The files are not verified:
    :func:`~nexus_cli.core.model.gpt_oss.adapter.read_adapter` does.

    Raises:
        ArtifactError: there is no such repository or revision, or it is no adapter.
        ResourceError: the hub does not answer or refuses, or its client is not installed.
    """
    client = _client(f"reading {repository}")
    with _explained(f"cannot read {repository}", repository.name):
        folder = client.snapshot_download(
            repository.name, revision=repository.revision, allow_patterns=SHARED, **LIBRARY
        )
    if not (Path(folder) / ADAPTER).is_file():
        raise ArtifactError(
            f"{repository} is not an adapter: it has no {ADAPTER}",
            hint="give a repository that nexus convert --push-to-hub wrote"
            f"; for a whole model: hf download {repository.name}",
        )
    if model_dir.is_model(Path(folder)):
        raise ArtifactError(
            f"{repository} is a whole model, not an adapter",
            hint=f"give its folder, {folder}",
        )
    return Path(folder)


def require_writer() -> None:
    """Refuse to begin what will be pushed where the client is missing or nobody is logged in.

    Raises:
        ResourceError: one of the two.
    """
    client = _client("--push-to-hub")
    if client.constants.HF_HUB_OFFLINE:
        raise ResourceError("cannot push: HF_HUB_OFFLINE is set", hint="unset it")
    if client.get_token() is None:
        raise ResourceError(
            "cannot push: there is no token of the hub on this machine",
            hint="run: hf auth login, or set HF_TOKEN, to a token that may write",
        )


def push(folder: Path, name: str, *, public: bool, message: str) -> tuple[str, bool]:
    """Upload :data:`SHARED` of ``folder`` in one commit; a card that is there already stays.

    Args:
        folder: holds what is to be seen.
        name: ``owner/name``, made if it is not there.
        public: whether a new repository is public, and one that is public may be written to.
        message: of the commit.

    Returns:
        The repository's URL, and whether it is private.

    Raises:
        ConfigError: the repository is public, and ``public`` is not said.
        ArtifactError: there is no such owner.
        ResourceError: the hub does not answer or refuses, or its client is not installed.
    """
    client = _client("--push-to-hub")
    with _explained(f"cannot push to {name}", name):
        api = client.HfApi(**LIBRARY)
        url = api.create_repo(name, private=not public, exist_ok=True)
        private = bool(api.repo_info(name).private)
        if not private and not public:
            raise ConfigError(
                f"{name} is a public repository", hint="give --public to publish the adapter there"
            )
        kept = [CARD] if api.file_exists(name, CARD) else None
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            allow_patterns=SHARED,
            ignore_patterns=kept,
        )
    return str(url), private


def _client(what: str) -> Any:
    """The package ``huggingface_hub``, which is an extra."""
    try:
        import huggingface_hub.constants  # noqa: PLC0415 (an extra, and slow to import)
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"{what} needs the package {error.name}",
            hint='install the extra: pip install "nexus-cli[hub]"',
        ) from error
    return huggingface_hub


@contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    """Turn what the client raises into an error for the user, which begins with ``what``."""
    try:
        yield
    except NexusError:
        raise
    except _failures() as error:
        raise explain(error, what, name) from error


def _failures() -> tuple[type[Exception], ...]:
    """What the client may raise; its versions differ in which errors they have."""
    from huggingface_hub import errors  # noqa: PLC0415 (an extra)

    names = ("XetDownloadError", "RevisionResolutionError")
    more = (getattr(errors, name) for name in names if hasattr(errors, name))
    # The bases hold the HTTP library's own error; what moves large files raises RuntimeError, and
    # a card or a name of another form is a ValueError.
    return (OSError, RuntimeError, ValueError, *errors.HfHubHTTPError.__bases__, *more)
