"""Adapters where a model is read: put together with their base, once, in the workspace's cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from nexus_cli import embedded
from nexus_cli.core.model.gpt_oss.adapter import (
    Adapter,
    apply_adapter,
    is_base,
    read_adapter,
    require_base,
)
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import adapter_dir, hub, hub_cache, lock, model_dir
from nexus_cli.io.hashing import sha256_json
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.inputs import Artifact, model_input

log = logging.getLogger(__name__)


def names_adapter(name: str | Path) -> bool:
    """Whether ``name`` is an adapter's folder, or ``hf://owner/name``; the hub is not asked."""
    return hub.is_uri(name) or model_dir.is_adapter(Path(name).expanduser())


def adapter_folder(name: str | Path) -> Path:
    """The folder of an adapter; one on the hub is downloaded into the hub's own cache.

    Raises:
        ConfigError: ``hf://...`` is misspelled.
        ArtifactError: the hub has no such repository, or it is no adapter.
        ResourceError: the hub cannot be read.
    """
    if not hub.is_uri(name):
        return Path(name).expanduser()
    folder = hub.pull(hub.parse_repository(name))
    log.info("%s is in %s", name, folder)
    return folder


def open_adapter(name: str | Path) -> Adapter:
    """The adapter in a folder or on the hub, verified.

    Raises:
        NexusError: see :func:`adapter_folder`.
        ArtifactError: it is damaged.
    """
    return read_adapter(adapter_folder(name), str(name))


def model_or_adapter(name: str | Path, workspace: Workspace, base: str | None) -> Artifact:
    """A whole model by name or path; what an adapter makes of its base counts as one.

    An adapter's model has the identity of the one that the adapter was made from: the rest of a
    run does not know which of the two it was given.

    Args:
        name: a model folder, an adapter's folder, ``hf://owner/name``, or the embedded model.
        workspace: whose cache keeps the adapter's model, at the price of the adapter.
        base: where the adapter's base is, if not where it is looked for by itself.

    Raises:
        ConfigError: there is no such model, or the adapter's base is not there.
        ArtifactError: the adapter is damaged, or the base is not the one that it was made from.
        ResourceError: the cache cannot be written, or the hub cannot be read.
    """
    if not names_adapter(name):
        return model_input(name)
    adapter = open_adapter(name)
    return model_input(_applied(adapter, find_base(adapter, base), workspace))


def find_base(adapter: Adapter, given: str | None) -> Path:
    """The folder of the model that an adapter was made from; nothing is downloaded.

    It is at ``given``; or where it was when the adapter was made on this machine; or, by its name,
    with the package or in the cache of the hub, if its fingerprint is the adapter's.

    Raises:
        ConfigError: it is at none of these.
        ArtifactError: another model is at ``given`` or where the base was, or the note of where
            it was is damaged.
    """
    # A note that is damaged is of no account where the base is given.
    recorded = None if given is not None else adapter_dir.read_local_base(adapter.path)
    named: str | Path | None = given
    if recorded is not None and model_dir.is_model(recorded):
        named = recorded
    if named is not None:
        found = model_dir.resolve_model(named)
        require_base(found, adapter)
        return found
    for place in _places(adapter):
        if _is_base(place, adapter):
            return place
    base, hint = adapter.config.base, "give its folder with --base"
    message = f"the base of {adapter.name}, {base.name}, is not on this machine"
    if recorded is not None:
        message = f"the base of {adapter.name} is not at {recorded}"
    if base.repository is not None:
        revision = f" --revision {base.revision}" if base.revision else ""
        hint = f"run: hf download {base.repository}{revision}; or {hint}"
    raise ConfigError(message, hint=hint)


def require_use(base: str | None, *models: str | Path | None) -> None:
    """Refuse a ``--base`` that none of the models asks for.

    Raises:
        ConfigError: no model is an adapter.
    """
    asked = (name for name in models if name is not None)
    if base is not None and not any(names_adapter(name) for name in asked):
        raise ConfigError(
            "--base says where the base of an adapter is, and no adapter is given",
            hint="leave it out, or give an adapter",
        )


def _places(adapter: Adapter) -> Iterator[Path]:
    """Where the model that the adapter names may be on any machine."""
    base = adapter.config.base
    if base.name == model_dir.EMBEDDED:
        yield embedded.MODEL_DIR.resolve()
    if base.repository is not None:
        for snapshot in hub_cache.snapshots(base.repository, base.revision):
            yield snapshot.resolve()


def _is_base(place: Path, adapter: Adapter) -> bool:
    """Whether that is the base; a download that was cut short is not."""
    try:
        return model_dir.is_model(place) and is_base(place, adapter)
    except ArtifactError:
        return False


def _applied(adapter: Adapter, base: Path, workspace: Workspace) -> Path:
    """The adapter's model in the cache. Ranks and commands at the same time wait for the first."""
    key = sha256_json([adapter.digest, str(base)])[:16]  # the model names the path of its base
    folder = workspace.root / "cache" / "adapters" / key
    with lock.exclusive(folder.with_name(f".{key}.lock"), wait=True):
        if not _is_whole(folder):
            apply_adapter(folder, base, adapter)
    log.info("reading %s on %s as %s", adapter.name, base, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the cached model is there; some of it may be deleted, or linked to what changed."""
    if not model_dir.is_model(folder):
        return False
    try:
        model_dir.fingerprint(folder)
    except ArtifactError:
        return False
    return True
