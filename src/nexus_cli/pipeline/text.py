"""Text for the stages: the sources of a config as documents, token ids, or packed sequences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_cli.config.shared import TextData
from nexus_cli.core.data.assemble import (
    TokenizerUse,
    blocks_wanted,
    nothing_left,
    tokenized_source,
)
from nexus_cli.core.data.blocks import PackedBlocks
from nexus_cli.core.data.build import Recipe, build_in_memory, build_through_cache
from nexus_cli.core.data.cache import content_digest
from nexus_cli.core.data.document import Document, LeftOut, TokenizedDocument
from nexus_cli.core.data.reader import read_documents
from nexus_cli.core.data.render import Renderer
from nexus_cli.core.data.report import DataReport, SourceReport
from nexus_cli.pipeline.text_sources import Split, find_sources, limited, pinned, translated

if TYPE_CHECKING:
    from nexus_cli.core.distributed import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourcePlan:
    """One source before it is read: where it will come from, for ``--dry-run``."""

    name: str
    split: str
    weight: float
    origin: str


@dataclass(frozen=True)
class Documents:
    """Documents, source after source, with their counts and the hash of their content."""

    documents: tuple[Document, ...]
    report: DataReport
    digest: str


@dataclass(frozen=True)
class TokenizedDocuments:
    """Whole documents as token ids, source after source, with counts and content hash."""

    documents: tuple[TokenizedDocument, ...]
    report: DataReport
    digest: str
    pad_id: int


@dataclass(frozen=True)
class TextBlocks:
    """Packed sequences, with their counts and the hash of their arrays."""

    blocks: PackedBlocks
    report: DataReport
    digest: str
    pad_id: int


def describe_sources(data: TextData, *, default_split: Split) -> list[SourcePlan]:
    """Say where each source will come from, reading nothing.

    Args:
        data: the sources.
        default_split: what the split ``auto`` means to this stage.

    Raises:
        ConfigError: a name is no known source, path or hub id.
        ArtifactError: a path holds no files of text.
        ResourceError: a known source whose text is not there.
    """
    with translated():
        return [
            SourcePlan(spec.name, spec.split, spec.weight, spec.text.origin)
            for spec in find_sources(data, default_split)
        ]


def load_documents(
    data: TextData, *, default_split: Split, max_documents: int | None = None
) -> Documents:
    """Read documents.

    Args:
        data: the sources; ``data.max_documents`` limits each.
        default_split: what the split ``auto`` means to this stage.
        max_documents: limit over all sources, shared by weight.

    Raises:
        ConfigError: a name is no known source, path or hub id.
        ArtifactError: a file is corrupt, or a row of no known layout.
        ResourceError: a source's text is not there, or there is none to use.
    """
    with translated():
        specs = pinned(limited(find_sources(data, default_split), max_documents))
        reports = [spec.report() for spec in specs]
        documents: list[Document] = []
        for index, (spec, report) in enumerate(zip(specs, reports, strict=True)):
            for item in read_documents(spec, index):
                if isinstance(item, LeftOut):
                    report.leave_out(item.reason)
                else:
                    report.documents += 1
                    documents.append(item)
            if report.documents == 0:
                raise nothing_left(report)
    _tell(reports)
    digest = content_digest([document.id for document in documents])
    return Documents(tuple(documents), DataReport(tuple(reports)), digest)


def load_tokenized(
    data: TextData,
    model_path: Path,
    *,
    default_split: Split,
    max_documents: int | None = None,
    num_processes: int = 1,
) -> TokenizedDocuments:
    """Read documents as token ids, whole.

    Args:
        data: the sources; ``data.max_documents`` limits each.
        model_path: folder with the tokenizer and its chat template.
        default_split: what the split ``auto`` means to this stage.
        max_documents: limit over all sources, shared by weight.
        num_processes: CPU workers; the result is the same for any number.

    Raises:
        NexusError: as :func:`load_documents`; ArtifactError also for a bad tokenizer.
    """
    with translated():
        specs = pinned(limited(find_sources(data, default_split), max_documents))
        tokenizer = TokenizerUse(model_path, Renderer.from_folder(model_path), num_processes)
        reports = [spec.report() for spec in specs]
        documents = [
            document
            for index, (spec, report) in enumerate(zip(specs, reports, strict=True))
            for document in tokenized_source(spec, index, report, tokenizer)
        ]
    _tell(reports)
    digest = content_digest([document.id for document in documents])
    report = DataReport(tuple(reports))
    return TokenizedDocuments(tuple(documents), report, digest, tokenizer.renderer.pad_id)


def load_blocks(
    data: TextData,
    model_path: Path,
    *,
    default_split: Split,
    num_blocks: int | None = None,
    cache_dir: Path | None = None,
    num_processes: int = 1,
    world: World | None = None,
) -> TextBlocks:
    """Read packed sequences of ``data.seq_len`` tokens.

    Args:
        data: the sources; ``data.max_documents`` limits each.
        model_path: folder with the tokenizer and its chat template.
        default_split: what the split ``auto`` means to this stage.
        num_blocks: sequences that the caller will take in all; each source gives its share and
            one more, or all it has. None reads every source to its end.
        cache_dir: where packed text is kept by content hash; None keeps it in memory only.
        num_processes: CPU workers; the result is the same for any number.
        world: with several ranks, rank 0 builds and the others map its cache.

    Raises:
        NexusError: as :func:`load_tokenized`.
    """
    with translated():
        specs = pinned(find_sources(data, default_split))
        tokenizer = TokenizerUse(model_path, Renderer.from_folder(model_path), num_processes)
        wanted = blocks_wanted(specs, num_blocks)
        recipe = Recipe(tuple(specs), tuple(wanted), tokenizer, data.seq_len)
        built = (
            build_in_memory(recipe)
            if cache_dir is None
            else build_through_cache(recipe, cache_dir, world)
        )
    _tell(built.report.sources)
    return TextBlocks(built.blocks, built.report, built.digest, tokenizer.renderer.pad_id)


def _tell(reports: Sequence[SourceReport]) -> None:
    for report in reports:
        log.info("%s", report.sentence())
