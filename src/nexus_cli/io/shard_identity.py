"""Which shard a file is, without hashing all of it.

Hashing the 63 GB of the 120B model would cost every command minutes. A shard's digest takes:

* the file's size and its header: names, dtypes, shapes and places of the tensors;
* every tensor of at most 2 MiB, whole: routers, norms, sinks, all biases;
* of every larger tensor eight pages of 4096 bytes, evenly spaced, the first and the last among
  them: attention, embedding, head, the experts' blocks and scales.

That is 25 MB of the 20B model and 117 MB of the 120B one.

So any byte of a small tensor shows, and a large one shows if it was trained or replaced as a whole.
What does not show is a change of single numbers of a large tensor, of a few of its rows or of a few
of its experts, that lies between its pages: this is no checksum against damage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nexus_cli.io.shard_header import METADATA, read_header

WHOLE_BYTES = 2 * 2**20
PAGES = 8
PAGE_BYTES = 4096


def shard_digest(shard: Path) -> str:
    """SHA-256, hex, of what the module says of a safetensors file, read in its order.

    Raises:
        ArtifactError: the file is truncated or not safetensors.
    """
    size, header = shard.stat().st_size, read_header(shard)
    digest = hashlib.sha256(json.dumps([size, header], sort_keys=True).encode())
    with shard.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        for start, length in _samples(header):
            file.seek(begin + start)
            digest.update(file.read(length))
    return digest.hexdigest()


def _samples(header: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Start, from the first tensor's, and length of each piece that is hashed; bytes."""
    spans = (entry["data_offsets"] for name, entry in header.items() if name != METADATA)
    for start, stop in sorted(spans):
        length = stop - start
        if length <= WHOLE_BYTES:
            yield start, length
            continue
        for number in range(PAGES):
            yield start + (length - PAGE_BYTES) * number // (PAGES - 1), PAGE_BYTES
