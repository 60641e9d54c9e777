"""Which model ``nexus validate`` judges, and what it is compared with."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nexus_cli.config.validate import SELF, ValidateConfig
from nexus_cli.core.model.gpt_oss.export import METADATA
from nexus_cli.core.model.gpt_oss.surgery import ROUTER
from nexus_cli.core.train.checkpoints import find_checkpoints
from nexus_cli.errors import ArtifactError, ConfigError, WorkspaceError
from nexus_cli.io import model_dir, tensor_files
from nexus_cli.io.manifest import Manifest
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.adapters import adapter_folder, model_or_adapter, require_use
from nexus_cli.pipeline.inputs import Artifact, model_input

TRAININGS = ("train", "train-offline")

log = logging.getLogger(__name__)

Kind = Literal["named", "base", "self"]


@dataclass(frozen=True)
class Choice:
    """The models of a validation.

    Attributes:
        model: What is judged.
        base: The folder that ``model`` was made from, or ``None`` if that is not known or
            not there.
        kind: ``named`` by the user; the ``base``; or ``self``: the same weights with the
            shared experts off.
        baseline: The folder compared with; ``None`` for ``self``.
        reason: Why this baseline, as a phrase for the report.
    """

    model: Artifact
    base: Artifact | None
    kind: Kind
    baseline: Artifact | None
    reason: str

    @property
    def loaded_base(self) -> Artifact | None:
        """The base, where it is loaded beside the model: ``self`` is asked to save that copy."""
        return None if self.kind == "self" else self.base

    @property
    def inputs(self) -> dict[str, Artifact]:
        """What the report depends on."""
        known = {"model": self.model, "base": self.base, "baseline": self.baseline}
        return {role: artifact for role, artifact in known.items() if artifact is not None}


@dataclass(frozen=True)
class Changes:
    """How the model's files differ from its base's.

    Attributes:
        frozen: Frozen tensors that are missing or have other bytes: none should.
        routers: Router tensors that differ: trained ones do.
    """

    frozen: tuple[str, ...]
    routers: tuple[str, ...]


def choose(config: ValidateConfig, workspace: Workspace) -> Choice:
    """Resolve the model and its baseline.

    Raises:
        ConfigError: a name is no model folder.
        WorkspaceError: no model was named, and the workspace has none, or a stale one.
        ArtifactError: a folder is damaged, or the two models do not go together.
    """
    path = _find_model(config, workspace)
    other = None if config.baseline in (None, SELF) else _folder(config.baseline)
    require_use(config.base, path, other)
    model = model_or_adapter(path, workspace, config.base)
    base = _base_of(model)
    if config.baseline is None:
        if base is not None:
            return Choice(model, base, "base", base, f"the base it was converted from, {base.path}")
        return Choice(model, None, "self", None, "its own weights with the shared experts off")
    if other is None:
        reason = "its own weights with the shared experts off, as asked"
        return Choice(model, base, "self", None, reason)
    named = model_or_adapter(other, workspace, config.base)
    _check_pair(model.path, named.path)
    if base is None and _is_plain(named.path):
        base = named
    return Choice(model, base, "named", named, f"{named.path}, as asked")


def changes(choice: Choice) -> Changes | None:
    """Compare the model's tensors with its base's, by bytes; ``None`` without a base."""
    if choice.base is None:
        return None
    names = tensor_files.differing(choice.model.path, choice.base.path)
    routers = tuple(name for name in names if ROUTER.fullmatch(name))
    return Changes(tuple(name for name in names if name not in routers), routers)


def _find_model(config: ValidateConfig, workspace: Workspace) -> Path:
    """The folder of what is judged: a model, or an adapter."""
    if config.checkpoint is not None:
        return _folder(config.checkpoint)
    finished = {name: found for name in TRAININGS if (found := workspace.find(name)) is not None}
    if finished:
        stage = max(finished, key=lambda name: _when(finished[name]))
        path = workspace.stage_dir(stage) / workspace.require(stage).main
    elif workspace.find("convert") is not None:
        path = workspace.stage_dir("convert") / workspace.require("convert").main
    else:
        raise WorkspaceError(
            f"{workspace.root} has no trained and no converted model",
            hint="run `nexus convert` and `nexus train` first, or name one with --model",
        )
    path = _newest_checkpoint(path)
    log.info("no --model was given: validating %s", path)
    return path


def _when(found: Manifest) -> str:
    return "" if found.finished is None else found.finished.isoformat()


def _folder(name: str) -> Path:
    """A model's or an adapter's folder, or the newest checkpoint of a training's folder."""
    path = adapter_folder(name)
    if model_dir.is_adapter(path):
        return path
    if not model_dir.is_model(path) and find_checkpoints(path):
        return _newest_checkpoint(path)
    return model_dir.resolve_model(name)


def _newest_checkpoint(path: Path) -> Path:
    if model_dir.is_model(path) or model_dir.is_adapter(path):
        return path
    found = find_checkpoints(path)
    if not found:
        raise ConfigError(
            f"{path} holds no model and no checkpoint", hint="name a model folder with --model"
        )
    log.info("%s: taking the newest checkpoint, %s", path, found[-1].path.name)
    return found[-1].path


def _base_of(model: Artifact) -> Artifact | None:
    """The base that the model's own metadata names, if it is there and still the same."""
    place = model.path / METADATA
    if not place.is_file():
        return None
    try:
        base = json.loads(place.read_text(encoding="utf-8"))["base"]
        path, fingerprint = Path(base["path"]), str(base["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{place} does not name the model's base", hint="convert the model again"
        ) from error
    if not model_dir.is_model(path):
        log.warning("the base %s is not there: not comparing with it", path)
        return None
    found = model_input(path)
    if found.digest != fingerprint:
        log.warning("%s is no longer the model that %s was made from", path, model.path)
        return None
    return found


def _is_plain(path: Path) -> bool:
    return model_dir.read_shape(path).num_shared_experts == 0


def _check_pair(model: Path, baseline: Path) -> None:
    one, other = model_dir.read_shape(model), model_dir.read_shape(baseline)
    for name in ("vocab_size", "num_layers", "num_experts", "top_k"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            raise ArtifactError(
                f"{model} and {baseline} cannot be compared: {name} is {mine} and {theirs}",
                hint="name a --baseline of the same family member and tokenizer",
            )
