"""Packed text kept between runs, under the hash of all that it is made from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nexus_cli.core.data.block_writer import STREAMS, map_blocks
from nexus_cli.core.data.blocks import PackedBlocks
from nexus_cli.core.data.reader import SourceSpec
from nexus_cli.core.data.render import TOKENIZER_FILES
from nexus_cli.core.data.report import DataReport, SourceReport
from nexus_cli.core.data.sources import HubText
from nexus_cli.core.data.template import FIXED_DATE
from nexus_cli.io.hashing import sha256_file, sha256_json

log = logging.getLogger(__name__)

FORMAT = "nexus.blocks/1"  # raise the number whenever the same input gives other blocks
ENTRY = "entry.json"
HASH_WHOLE = 64 << 20  # bytes; a larger file is known by its path, size and time


@dataclass(frozen=True)
class BuiltBlocks:
    """A set of blocks with the counts of its making and the hash of its arrays."""

    blocks: PackedBlocks
    report: DataReport
    digest: str


def cache_key(
    specs: Sequence[SourceSpec], model_path: Path, seq_len: int, wanted: Sequence[int | None]
) -> str:
    """The hash (hex) of everything that decides what the blocks are.

    Args:
        specs: the sources.
        model_path: folder with the tokenizer and its templates.
        seq_len: tokens a block.
        wanted: blocks of each source.
    """
    return sha256_json(
        {
            "format": FORMAT,
            "date": FIXED_DATE.isoformat(),
            "tokenizer": [_file(model_path / name, named=True) for name in TOKENIZER_FILES],
            "seq_len": seq_len,
            "sources": [[_source(spec), count] for spec, count in zip(specs, wanted, strict=True)],
        }
    )


def blocks_digest(hashes: dict[str, str], counts: Sequence[int], seq_len: int) -> str:
    """The hash (hex) of a set of blocks: their arrays and which source each is of."""
    return sha256_json({"streams": hashes, "counts": list(counts), "seq_len": seq_len})


def write_entry(
    folder: Path, *, report: DataReport, hashes: dict[str, str], counts: list[int], seq_len: int
) -> None:
    """Describe the streams in ``folder``; written last."""
    entry = {
        "format": FORMAT,
        "seq_len": seq_len,
        "counts": counts,
        "streams": hashes,
        "sources": [asdict(source) for source in report.sources],
    }
    (folder / ENTRY).write_text(json.dumps(entry, indent=1), encoding="utf-8")


def read_entry(folder: Path, *, verify: bool = True) -> BuiltBlocks | None:
    """Open a cache entry; None if there is none, or with a warning if it is damaged.

    Args:
        folder: the entry.
        verify: hash the arrays; without it, only their sizes are checked.
    """
    if not folder.is_dir():
        return None
    try:
        entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        counts, seq_len, hashes = entry["counts"], entry["seq_len"], entry["streams"]
        for name in STREAMS:
            if verify and sha256_file(folder / name) != hashes[name]:
                raise ValueError(f"{name} is damaged")
        report = DataReport(tuple(SourceReport(**source) for source in entry["sources"]))
        blocks = map_blocks(folder, counts, seq_len)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the text cache %s is damaged and is made again: %s", folder, error)
        return None
    return BuiltBlocks(blocks, report, blocks_digest(hashes, counts, seq_len))


def _source(spec: SourceSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": spec.name,  # the shuffle depends on it
        "split": spec.split,
        "held_out": spec.held_out,
        "seed": spec.seed,
        "max_documents": spec.max_documents,
    }
    if isinstance(spec.text, HubText):
        return {**fields, "hub": asdict(spec.text), "revision": spec.revision}
    files = [_file(path) for path in spec.text.files]
    return {**fields, "files": files, "is_split": spec.text.is_split}


def _file(path: Path, *, named: bool = False) -> list[Any]:
    name = path.name if named else ""
    if not path.is_file():
        return [name, None]
    state = path.stat()
    if state.st_size <= HASH_WHOLE:
        return [name, sha256_file(path)]
    return [name, str(path.resolve()), state.st_size, state.st_mtime_ns]


def content_digest(ids: Sequence[str]) -> str:
    """The hash (hex) of a list of documents, from their content hashes."""
    return hashlib.sha256("\n".join(ids).encode("ascii")).hexdigest()
