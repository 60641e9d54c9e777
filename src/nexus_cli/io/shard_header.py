"""The header of a safetensors file, checked against the file's size; no tensor is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from nexus_cli.errors import ArtifactError

METADATA = "__metadata__"  # the one key of a header that is no tensor


def read_header(shard: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        ArtifactError: the file is truncated or not safetensors.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ArtifactError(
                f"{shard} is not a safetensors file, or is truncated", hint="download it again"
            )
        try:
            header = dict(json.loads(file.read(length)))
            end = max((_stop(v) for k, v in header.items() if k != METADATA), default=0)
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{shard} has a damaged header", hint="download it again"
            ) from error
    whole = 8 + length + end
    if size != whole:
        raise ArtifactError(
            f"{shard} is {'truncated' if size < whole else 'too long'}: {size} bytes of {whole}",
            hint="download it again",
        )
    return header


def _stop(entry: dict[str, Any]) -> int:
    """Where a tensor's span ends.

    Raises:
        ValueError: its offsets are no span.
        TypeError, KeyError: it has none.
    """
    start, stop = entry["data_offsets"]
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
        raise ValueError(f"{entry['data_offsets']} is no span of bytes")
    return stop
