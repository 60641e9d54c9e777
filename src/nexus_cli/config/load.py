"""Resolve a stage's config: defaults < shared YAML blocks < the stage's block < --set < flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from nexus_cli.config.base import ConfigModel
from nexus_cli.errors import ConfigError

STAGES = frozenset({"collect", "pca", "convert", "precompute", "train", "validate", "plot"})
SHARED = frozenset({"model", "data", "runtime", "dtype"})

ConfigT = TypeVar("ConfigT", bound=ConfigModel)


def resolve(
    kind: type[ConfigT],
    section: str,
    /,
    *,
    file: Path | None = None,
    sets: Sequence[str] = (),
    **flags: Any,
) -> ConfigT:
    """Build a ``kind``. ``sets`` are ``path=value`` strings; a flag of ``None`` was not given.

    Of ``kind.alternatives``, one that the command line gives takes the place of the file's others.

    Raises:
        ConfigError: an unreadable file, an unknown key, or a value out of its range; the
            message names every bad key.
    """
    document = _read(file) if file else {}
    values = {key: document[key] for key in SHARED & document.keys() & kind.model_fields.keys()}
    block = document.get(section) or {}
    if not isinstance(block, Mapping):
        raise ConfigError(f"{file}: block '{section}' must hold keys and values")
    typed: dict[str, Any] = {}
    for layer in (*map(_parse_set, sets), _given(flags)):
        typed = _merge(typed, layer)
    replaced = _replaced(kind.alternatives, typed)
    values = _merge(values, {key: block[key] for key in block if key not in replaced})
    values = _merge(values, typed)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            _problem(section, e["loc"], e["type"], e["msg"]) for e in error.errors()
        )
        raise ConfigError(
            f"invalid settings: {problems}",
            hint=f"nexus {section} --help lists the flags, docs/configuration.md every setting",
        ) from error


def _replaced(groups: Iterable[Sequence[str]], typed: Mapping[str, Any]) -> set[str]:
    """The settings of a file that ``typed``, the command line's, gives in another way."""
    return {
        name
        for group in groups
        if any(typed.get(other) is not None for other in group)
        for name in group
    }


def _problem(section: str, location: Sequence[int | str], kind: str, message: str) -> str:
    where = ".".join(map(str, (section, *location)))
    if kind == "extra_forbidden":
        return f"{where} is an unknown key"
    return f"{where}: {message.removeprefix('Value error, ')}"


def _read(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(
            f"cannot read {file}: {error.strerror}", hint="check the path given with --config"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text", hint="save it as UTF-8 YAML") from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())  # one line
        raise ConfigError(f"{file} is not valid YAML: {said}", hint="mend that line") from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{file} must hold blocks such as 'train:', not a {type(document).__name__}",
            hint="configs/demo.yaml is an example",
        )
    if unknown := sorted(map(str, document.keys() - STAGES - SHARED)):
        raise ConfigError(
            f"{file}: unknown block {', '.join(unknown)}",
            hint=f"the blocks are {', '.join(sorted(STAGES | SHARED))}",
        )
    return document


def _parse_set(text: str) -> dict[str, Any]:
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise ConfigError(
            f"--set takes path=value, not {text!r}", hint="for instance --set data.seq_len=512"
        )
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {path}: {value!r} is not a YAML value", hint="quote it"
        ) from error
    for name in reversed(path.split(".")):
        parsed = {name: parsed}
    return dict(parsed)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """``flags`` without the ones that the user left out."""
    nested = {k: _given(v) if isinstance(v, Mapping) else v for k, v in flags.items()}
    return {k: v for k, v in nested.items() if v is not None and v != {}}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` on top, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged
