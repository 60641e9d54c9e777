"""The ``nexus.unit_contributions/1`` file: what each hidden unit of the routed experts contributes.

An ``.npz`` beside ``pca_stats.json``, whose entry ``unit_contributions`` names it and its hash; one
float32 array ``contribution`` ``[layers, experts, width]``: the mean over tokens of the applied
weight times the activation's magnitude times the length of the unit's down column.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_cli.errors import ArtifactError
from nexus_cli.io.atomic import atomic_file
from nexus_cli.io.hashing import sha256_file

FORMAT = "nexus.unit_contributions/1"
ENTRY = "unit_contributions"  # of pca_stats.json
AGAIN = "run nexus pca again, with --force"
BOTH = "copy both files of nexus pca into one folder, or run nexus pca again, with --force"


def path_beside(stats: Path) -> Path:
    """Where the contributions that belong to the statistics at ``stats`` are written."""
    return stats.with_name(f"{stats.stem}.units.npz")


def write(path: Path, contribution_LEI: NDArray[np.floating[Any]]) -> dict[str, str]:
    """Write the file; equal contents give equal bytes.

    Returns:
        The entry of ``pca_stats.json`` that names it.
    """
    values = contribution_LEI.astype(np.float32)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, contribution=values)
    return {"format": FORMAT, "file": path.name, "sha256": sha256_file(path)}


def read(stats: Path, document: Mapping[str, Any]) -> NDArray[np.float32]:
    """The contributions that the statistics ``document``, read from ``stats``, name.

    The statistics may have another name than they were written by; the file is in their folder.

    Raises:
        ArtifactError: they name none, or the file is missing, damaged or another one.
    """
    entry = document.get(ENTRY)
    if entry is None:
        raise ArtifactError(
            f"{stats} does not say what hidden units contribute: nexus collect did not sum that",
            hint="run nexus collect and nexus pca again, or use --init-strategy pca_topK",
        )
    if not isinstance(entry, Mapping) or entry.get("format") != FORMAT:
        raise ArtifactError(f"{stats} is damaged: its {ENTRY} are of no known format", hint=AGAIN)
    path = _find(stats, entry)
    if sha256_file(path) != entry.get("sha256"):
        raise ArtifactError(f"{path} is damaged, or of other statistics than {stats}", hint=BOTH)
    try:
        with np.load(path, allow_pickle=False) as file:
            contribution_LEI: NDArray[np.float32] = file["contribution"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"{path} is not a {FORMAT} file", hint=AGAIN) from error
    return contribution_LEI


def _find(stats: Path, entry: Mapping[str, Any]) -> Path:
    """The file under the name that fits the statistics' now, or else the name it was written by."""
    name = entry.get("file")
    if not isinstance(name, str):
        raise ArtifactError(f"{stats} is damaged: its {ENTRY} name no file", hint=AGAIN)
    # only in the same folder: a file that was copied here must not reach for another
    written = stats.parent / Path(name).name
    for path in (path_beside(stats), written):
        if path.is_file():
            return path
    raise ArtifactError(f"{written} is missing; it belongs to {stats}", hint=BOTH)
