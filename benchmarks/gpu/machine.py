"""What a benchmark ran on; asked without a CUDA context, which would take memory of the card."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime

PACKAGES = ("torch", "triton", "transformers")


def machine() -> dict[str, str]:
    """GPU, driver, versions and date, as every benchmark prints them."""
    return {
        **_gpu(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} threads",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "nexus": _version("nexus-cli"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def print_machine() -> dict[str, str]:
    """Print one line of it, and return it."""
    found = machine()
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return found


def _gpu() -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"gpu": "none"}
    keys = ("name", "driver_version", "memory.total", "power.limit")
    query = [tool, f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "-i", "0"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"gpu": "unknown"}
    name, driver, memory, power = (part.strip() for part in done.stdout.strip().split(",", 3))
    return {"gpu": name, "driver": driver, "gpu_memory": memory, "power_limit": power}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "nexus-cli":
            from nexus_cli import __version__  # noqa: PLC0415  # run from the source tree

            return __version__
        return "none"
