"""The ``nexus.router_probs/1`` file: router statistics as a plain ``.npz``, without pickle.

Its arrays are described in ``docs/router-statistics.md``; ``metadata`` is a JSON object in UTF-8
bytes. Every sum is checked against the others when the file is read, so that a file which was cut
short, edited or written by another tool is refused with a reason.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_cli.errors import ArtifactError
from nexus_cli.io.atomic import atomic_file

# Shape letters in this file: L layers, E experts, I expert width, R tokens in the reservoir.

FORMAT = "nexus.router_probs/1"
POPULATIONS = ("body", "first")
SUMS: Mapping[str, tuple[str, int]] = {  # name -> dtype, dimensions over (L, E, E)
    "tokens": ("int64", 0),
    "probability": ("float64", 2),
    "outer": ("float64", 3),
    "top1": ("int64", 2),
    "topk": ("int64", 2),
    "weight": ("float64", 2),
}
UNITS = "unit_contribution"  # float64 [L, E, I]; not in statistics of routers alone
_SHAPE = ("num_layers", "num_experts", "top_k")
_ANEW = "run: nexus collect --output FILE"


@dataclass(frozen=True)
class RouterProbs:
    """What the file holds: arrays under their names in the file, and the metadata."""

    arrays: Mapping[str, NDArray[Any]]
    metadata: Mapping[str, Any]


def write(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write a file that :func:`read` accepts; equal contents give equal bytes.

    Args:
        path: where to.
        arrays: every array of the format but ``metadata``.
        metadata: JSON values; ``num_layers``, ``num_experts`` and ``top_k`` are required.
    """
    text = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    encoded = np.frombuffer(text.encode(), dtype=np.uint8)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, metadata=encoded, **arrays)


def read(path: Path) -> RouterProbs:
    """Read and check a file.

    Raises:
        ArtifactError: the file is missing, cut short, of another format, or contradicts itself.
    """
    with _open(path) as file:
        metadata = _metadata(path, file)
        names = [f"{p}_{name}" for p in POPULATIONS for name in SUMS]
        names += ["reservoir_keys", "reservoir_probability"]
        if missing := sorted(set(names) - set(file.files)):
            raise ArtifactError(f"{path} lacks {', '.join(missing)}", hint=_ANEW)
        names += [UNITS] if UNITS in file.files else []
        arrays = {name: file[name] for name in names}
    for reason in _contradictions(arrays, metadata):
        raise ArtifactError(f"{path} is damaged: {reason}", hint=_ANEW)
    return RouterProbs(arrays, metadata)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An ``.npz`` file, read without pickle; whatever is wrong with it is an ArtifactError."""
    try:
        # opened here: numpy leaves the file open when its end is missing
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ArtifactError(f"{path} is a single array, not a {FORMAT} file", hint=_ANEW)
            with loaded:
                yield loaded
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist", hint=_ANEW) from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"{path} is cut short or not a {FORMAT} file", hint=_ANEW) from error


def _metadata(path: Path, file: Any) -> dict[str, Any]:
    if "metadata" not in file.files:
        raise ArtifactError(f"{path} is not a {FORMAT} file: it has no metadata", hint=_ANEW)
    encoded = file["metadata"]
    try:
        metadata = json.loads(encoded.astype(np.uint8).tobytes())
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: its metadata is not JSON", hint=_ANEW) from error
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found != FORMAT:
        raise ArtifactError(f"{path} is of format {found!r}, not {FORMAT!r}", hint=_ANEW)
    if bad := [key for key in _SHAPE if not isinstance(metadata.get(key), int)]:
        raise ArtifactError(f"{path}: its metadata lacks {', '.join(bad)}", hint=_ANEW)
    return dict(metadata)


def _contradictions(
    arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]
) -> Iterator[str]:
    """What cannot be true of statistics of one router."""
    layers, experts, top_k = (metadata[key] for key in _SHAPE)
    shape = (layers, experts, experts)
    for population in POPULATIONS:
        for name, (dtype, dimensions) in SUMS.items():
            array = arrays[f"{population}_{name}"]
            if array.dtype != dtype or array.shape != shape[:dimensions]:
                yield f"{population}_{name} is {array.dtype}{list(array.shape)}"
                return
        tokens = int(arrays[f"{population}_tokens"])
        sums = {name: arrays[f"{population}_{name}"] for name in SUMS}
        close = 1e-9 * max(1, tokens)
        for name, each in (("probability", 1), ("weight", 1), ("top1", 1), ("topk", top_k)):
            if not np.allclose(sums[name].sum(-1), each * tokens, rtol=0, atol=close):
                yield f"{population}_{name} does not add up to {each * tokens} in every layer"
        if not np.allclose(sums["outer"].sum(-1), sums["probability"], rtol=0, atol=close):
            yield f"the rows of {population}_outer do not add up to {population}_probability"
    kept, sample = arrays["reservoir_keys"], arrays["reservoir_probability"]
    if kept.dtype != "uint64" or sample.dtype != "float16":
        yield f"the reservoir is of {kept.dtype} and {sample.dtype}"
    if sample.shape != (*kept.shape, layers, experts):
        yield f"the reservoir is of shape {list(sample.shape)}"
    if UNITS in arrays:
        yield from _wrong_units(arrays[UNITS], (layers, experts))


def _wrong_units(sums_LEI: NDArray[Any], shape: tuple[int, int]) -> Iterator[str]:
    if sums_LEI.dtype != "float64" or sums_LEI.ndim != 3 or sums_LEI.shape[:2] != shape:
        yield f"{UNITS} is {sums_LEI.dtype}{list(sums_LEI.shape)}"
    elif not (sums_LEI >= 0).all():  # NaN is not, either
        yield f"{UNITS} holds numbers that are no sums of magnitudes"
