"""Virtual environments for benchmarks that need other versions than the one they run in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from runs import ROOT

STAMP = "requirements.txt"  # written last: an environment without it is not whole


def pinned(package: str) -> str:
    """The requirement of ``package`` in constraints.txt, such as ``torch==2.13.0``."""
    found = re.search(rf"^{package}==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"constraints.txt does not pin {package}")
    return found[0]


def environment(folder: Path, requirements: Sequence[str]) -> Path:
    """The Python of a virtual environment that holds ``requirements`` and what they need.

    It is made with pip, from the index that pip is configured with, and used again if it was
    made of the same requirements by the same Python.
    """
    python, stamp = folder / "bin" / "python", folder / STAMP
    wanted = "\n".join((f"# {sys.version}".replace("\n", " "), *requirements, ""))
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    sys.stderr.write(f"making {folder} with {', '.join(requirements)}\n")
    words = [item for one in requirements for item in one.split(" ", 1)]
    run([sys.executable, "-m", "venv", "--clear", folder])
    run([python, "-m", "pip", "install", "--quiet", *words])
    stamp.write_text(wanted)
    return python


def run(
    command: Sequence[object], cwd: Path | None = None, *, loud: bool = True, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that sees no source tree and nothing of the hub's network.

    Raises:
        subprocess.CalledProcessError: it failed; if ``loud``, what it printed is on stderr.
    """
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | offline | {"TOKENIZERS_PARALLELISM": "false"} | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and loud:
        sys.stderr.write(done.stdout + done.stderr)
    done.check_returncode()
    return done
