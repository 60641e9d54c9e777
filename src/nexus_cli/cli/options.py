"""Options shared by every command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nexus_cli.config.base import ConfigModel, RuntimeConfig

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; flags win over it.")
]
WorkspaceDir = Annotated[
    Path, typer.Option("--workspace", "-w", help="Directory this run reads from and writes to.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override any setting, as path=value.")
]
Force = Annotated[bool, typer.Option("--force", help="Run again, and replace what is there.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run, on what, and whether it fits.")
]


def flag(model: type[ConfigModel], field: str, *names: str) -> Any:
    """A Typer option whose help and default come from ``model``'s field, by its dotted path."""
    info = None
    owner: Any = model
    for part in field.split("."):
        info = owner.model_fields[part]
        owner = info.annotation
    assert info is not None
    default = info.get_default(call_default_factory=False)
    return typer.Option(*names, help=info.description, show_default=_shown(default))


def _shown(default: Any) -> str | bool:
    """Text for the help page; ``False`` where the default is to be worked out."""
    simple = isinstance(default, (str, int, float))
    return str(default) if simple and not isinstance(default, bool) else False


ExpertsBackend = Annotated[str | None, flag(RuntimeConfig, "experts_backend", "--experts-backend")]
