"""The ``nexus`` command, and the only place that ends the process."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from nexus_cli import __version__
from nexus_cli.cli.lazy import INTERRUPTED, LazyGroup
from nexus_cli.errors import NexusError

app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"nexus {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Train a shared expert into GPT-OSS mixture-of-experts models."""


def main() -> None:
    """Run the app; a :class:`NexusError` becomes a message and an exit code."""
    try:
        app(prog_name="nexus")
    except NexusError as error:
        _complain("error", str(error))
        if error.hint:
            _complain("hint", error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain("error", INTERRUPTED)
        sys.exit(130)


def _complain(label: str, text: str) -> None:
    """Under a launcher every failing rank speaks: the first to fail takes the others down."""
    prefix = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    sys.stderr.write(f"{prefix}{label}: {text}\n")
