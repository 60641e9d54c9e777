"""Rows of a corpus: reading them, and what each one says about its licence."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Text under these may be shipped with the package. Share-alike text may not, and neither may
# text whose terms a row does not state.
PERMISSIVE_LICENSES = frozenset(
    {
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "MIT",
        "MIT (public-domain novels)",
        "MIT OR Apache-2.0",
        "PDDL-1.0 / CC0-1.0",
        "PSF-2.0",
        "PostgreSQL",
        "WordNet-3.0",
        "public domain",
    }
)


@dataclass(frozen=True, eq=False)  # one row is itself and no other, so it may key a dict
class Row:
    """One conversation or text of the corpus.

    Attributes:
        fields: the row as stored.
        domain: the folder it came from, such as ``code``.
        stem: its file, such as ``codeio``.
        index: its place in that file.
    """

    fields: dict[str, Any]
    domain: str
    stem: str
    index: int

    @property
    def uuid(self) -> str:
        """The row's identity."""
        return str(self.fields["uuid"])

    @property
    def license(self) -> str:
        """The licence of this very row, which wins over the one of its file."""
        return str(self.fields.get("row_license") or self.fields["license"])

    @property
    def source(self) -> str:
        """Where the text came from."""
        package = str(self.fields.get("package") or "")
        if not package:
            return str(self.fields["source"]).rstrip(",")
        return package if package.startswith("CPython") else f"PyPI {package}"

    @property
    def is_permissive(self) -> bool:
        """Whether the text may be shipped."""
        return self.license in PERMISSIVE_LICENSES

    def content(self) -> str:
        """Every word that people or models wrote in the row, without template or tools."""
        if "text" in self.fields:
            return str(self.fields["text"])
        return "\n".join(_message_text(message) for message in self.fields["messages"])


def _message_text(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls") or []
    arguments = (str(call["function"]["arguments"]) for call in calls)
    return "\n".join([message.get("content") or "", *arguments])


def read_corpus(folder: Path) -> Iterator[Row]:
    """Read every ``DOMAIN/*.jsonl`` and ``DOMAIN/*.jsonl.gz`` of a folder, in name order."""
    paths = [*folder.glob("*/*.jsonl"), *folder.glob("*/*.jsonl.gz")]
    if not paths:
        raise FileNotFoundError(f"no DOMAIN/*.jsonl(.gz) under {folder}")
    for path in sorted(paths):
        stem = path.name.split(".")[0]
        for index, fields in enumerate(read_jsonl(path)):
            yield Row(fields, path.parent.name, stem, index)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read one JSONL file, gzipped or not."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write gzipped JSONL, the same bytes for the same rows."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
