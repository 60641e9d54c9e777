"""Adapters where a model is read: put together with their base, once, in the workspace's cache."""

from __future__ import annotations

import logging
from pathlib import Path

from nexus_cli.core.model.gpt_oss.adapter import (
    Adapter,
    apply_adapter,
    read_adapter,
    require_base,
)
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import lock, model_dir
from nexus_cli.io.hashing import sha256_json
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.inputs import Artifact, model_input

log = logging.getLogger(__name__)


def model_or_adapter(name: str | Path, workspace: Workspace, base: str | None) -> Artifact:
    """A whole model by name or path; what an adapter makes of its base counts as one.

    An adapter's model has the identity of the one that the adapter was made from: the rest of a
    run does not know which of the two it was given.

    Args:
        name: a model folder, an adapter's folder, or the embedded model.
        workspace: whose cache keeps the adapter's model, at the price of the adapter.
        base: where the adapter's base is, if not where the adapter says.

    Raises:
        ConfigError: there is no such model, or the adapter's base is not there.
        ArtifactError: the adapter is damaged, or the base is not the one that it was made from.
        ResourceError: the cache cannot be written.
    """
    path = Path(name).expanduser()
    if not model_dir.is_adapter(path):
        return model_input(name)
    adapter = read_adapter(path)
    return model_input(_applied(adapter, find_base(adapter, base), workspace))


def find_base(adapter: Adapter, given: str | None) -> Path:
    """The folder of the model that an adapter was made from.

    Raises:
        ConfigError: it is not at ``given``, or not where the adapter says.
        ArtifactError: another model is there.
    """
    recorded = Path(adapter.config.base.path)
    if given is None and not model_dir.is_model(recorded):
        raise ConfigError(
            f"the base of {adapter.path} is not at {recorded}", hint="give its folder with --base"
        )
    found = model_dir.resolve_model(recorded if given is None else given)
    require_base(found, adapter)
    return found


def require_use(base: str | None, *models: str | Path | None) -> None:
    """Refuse a ``--base`` that none of the models asks for.

    Raises:
        ConfigError: no model is an adapter.
    """
    asked = (Path(name).expanduser() for name in models if name is not None)
    if base is not None and not any(model_dir.is_adapter(path) for path in asked):
        raise ConfigError(
            "--base says where the base of an adapter is, and no adapter is given",
            hint="leave it out, or give an adapter",
        )


def _applied(adapter: Adapter, base: Path, workspace: Workspace) -> Path:
    """The adapter's model in the cache. Ranks and commands at the same time wait for the first."""
    key = sha256_json([adapter.digest, str(base)])[:16]  # the model names the path of its base
    folder = workspace.root / "cache" / "adapters" / key
    with lock.exclusive(folder.with_name(f".{key}.lock"), wait=True):
        if not _is_whole(folder):
            apply_adapter(folder, base, adapter)
    log.info("reading %s on %s as %s", adapter.path, base, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the cached model is there; someone may have deleted some of it."""
    if not model_dir.is_model(folder):
        return False
    try:
        model_dir.weight_map(folder)
    except ArtifactError:
        return False
    return True
