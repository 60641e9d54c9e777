"""Documents of one source: its rows normalised, split, and shuffled in a window."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nexus_cli.core.data.document import Document, LeftOut, is_held_out
from nexus_cli.core.data.errors import BadFileError, BadRowError, UnusableRowError, bad_file
from nexus_cli.core.data.files import read_rows
from nexus_cli.core.data.normalise import normalise
from nexus_cli.core.data.report import SourceReport
from nexus_cli.core.data.sources import HubText, LocalText

ItemT = TypeVar("ItemT")
SHUFFLE_WINDOW = 1024  # documents held back, so that files sorted by kind are read in mixture


@dataclass(frozen=True)
class SourceSpec:
    """One source to read, as plain values.

    Attributes:
        name: for the report and the shuffle.
        text: where the text is.
        split: ``train``, ``held-out`` or ``all``.
        weight: share of the mixture, relative to the others.
        held_out: share of documents that is held out, by content hash.
        seed: of the order of reading.
        max_documents: stop after so many.
        revision: of a hub data set.
    """

    name: str
    text: LocalText | HubText
    split: str
    weight: float = 1.0
    held_out: float = 0.02
    seed: int = 0
    max_documents: int | None = None
    revision: str = ""

    def report(self) -> SourceReport:
        """An empty report to fill in."""
        return SourceReport(name=self.name, split=self.split, origin=self.text.origin)


def read_documents(spec: SourceSpec, source_index: int) -> Iterator[Document | LeftOut]:
    """Yield the documents of a source, in an order that depends on its seed alone.

    Args:
        spec: the source.
        source_index: its place in the mixture.

    Raises:
        BadFileError: a file is corrupt, or a row of no known layout.
        MissingTextError: the network failed.
    """
    found = _documents(spec, source_index)
    num_documents = 0
    for item in shuffled(found, SHUFFLE_WINDOW, f"{spec.seed}:{spec.name}"):
        if isinstance(item, Document):
            if num_documents == spec.max_documents:
                return
            num_documents += 1
        yield item


def shuffled(items: Iterable[ItemT], window: int, seed: str) -> Iterator[ItemT]:
    """Yield items in a random order, holding at most ``window`` of them."""
    chance = random.Random(seed)
    held: list[ItemT] = []
    for item in items:
        if len(held) < window:
            held.append(item)
            continue
        place = chance.randrange(window)
        yield held[place]
        held[place] = item
    chance.shuffle(held)
    yield from held


def _documents(spec: SourceSpec, source_index: int) -> Iterator[Document | LeftOut]:
    presplit = isinstance(spec.text, LocalText) and spec.text.is_split
    for where, number, row in _rows(spec):
        try:
            document = normalise(row, source_index=source_index)
        except UnusableRowError as reason:
            yield LeftOut(str(reason))
            continue
        except BadRowError as error:
            if isinstance(where, Path):
                raise bad_file(where, number, str(error)) from error
            raise BadFileError(f"{where}, row {number}: {error}") from error
        if presplit or _in_split(document, spec):
            yield document


def _in_split(document: Document, spec: SourceSpec) -> bool:
    if spec.split == "all":
        return True
    return is_held_out(document.id, spec.held_out) == (spec.split == "held-out")


def _rows(spec: SourceSpec) -> Iterator[tuple[Path | str, int, Any]]:
    """Every row with its file (or hub data set) and its number there."""
    if isinstance(spec.text, HubText):
        from nexus_cli.core.data import hub  # noqa: PLC0415 (datasets is an extra)

        for number, row in hub.stream_rows(spec.text, spec.revision):
            yield spec.text.origin, number, row
        return
    files = list(spec.text.files)
    random.Random(f"{spec.seed}:files").shuffle(files)
    for path in files:
        for number, row in read_rows(path):
            yield path, number, row
