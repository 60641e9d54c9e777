"""Text for the stages: the sources of a config as documents, token ids, or packed sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nexus_cli.config.shared import TextData
from nexus_cli.core.data.blocks import PackedBlocks
from nexus_cli.core.data.document import Document, TokenizedDocument
from nexus_cli.core.data.report import DataReport

if TYPE_CHECKING:
    from nexus_cli.core.distributed import World

Split = Literal["train", "held-out"]


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
    """Whole documents as token ids, source after source."""

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

    Raises:
        ConfigError: a name is no known source, path or hub id.
        ResourceError: a known source whose text is not there.
    """
    raise NotImplementedError


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
        ArtifactError: a file is corrupt.
        ResourceError: a source's text is not there.
    """
    raise NotImplementedError


def load_tokenized(
    data: TextData,
    model_path: Path,
    *,
    default_split: Split,
    max_documents: int | None = None,
    num_processes: int = 1,
) -> TokenizedDocuments:
    """Read documents as token ids; arguments and errors as :func:`load_documents`.

    Args:
        model_path: folder with the tokenizer and its chat template.
        num_processes: CPU workers; the result is the same for any number.
    """
    raise NotImplementedError


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
    """Read packed sequences of ``data.seq_len`` tokens; errors as :func:`load_documents`.

    Args:
        num_blocks: sequences that the caller will take in all; each source gives its share and
            one more, or all it has. None reads every source to its end.
        cache_dir: where packed text is kept by content hash; None keeps it in memory only.
        world: with several ranks, rank 0 builds and the others map the cache.
    """
    raise NotImplementedError
