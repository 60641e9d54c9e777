"""From sources to token ids and to packed sequences, reading no more than is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from nexus_cli.core.data.block_writer import BlockWriter
from nexus_cli.core.data.document import LeftOut, TokenizedDocument
from nexus_cli.core.data.errors import MissingTextError, UnusableRowError
from nexus_cli.core.data.order import take_turns
from nexus_cli.core.data.packing import NOT_IN_SEQ_LEN, Piece, cut, pack
from nexus_cli.core.data.reader import SourceSpec, read_documents
from nexus_cli.core.data.render import Renderer
from nexus_cli.core.data.report import SourceReport
from nexus_cli.core.data.tokenize import tokenize_documents


@dataclass(frozen=True)
class TokenizerUse:
    """The tokenizer of a model folder, and how many CPU workers may use it."""

    path: Path
    renderer: Renderer
    num_processes: int = 1


def shares_of(specs: Sequence[SourceSpec], total: int) -> list[int]:
    """Divide ``total`` documents among the sources by weight, to within one."""
    turns = take_turns([spec.weight for spec in specs], total)
    return [int(count) for count in np.bincount(turns, minlength=len(specs))]


def blocks_wanted(specs: Sequence[SourceSpec], num_blocks: int | None) -> list[int | None]:
    """How many blocks each source should give, so that none is seen twice before it has to be."""
    if num_blocks is None:
        return [None] * len(specs)
    total = sum(spec.weight for spec in specs)
    return [math.ceil(num_blocks * spec.weight / total) + 1 for spec in specs]


def tokenized_source(
    spec: SourceSpec,
    source_index: int,
    report: SourceReport,
    tokenizer: TokenizerUse,
) -> Iterator[TokenizedDocument]:
    """Yield the documents of a source as token ids.

    Args:
        spec: the source.
        source_index: its place in the mixture.
        report: counts what is yielded and what is left out; nothing that is merely read ahead.
        tokenizer: what to tokenise with.

    Raises:
        BadFileError: a file is corrupt, or the chat template cannot be used.
        MissingTextError: nothing is left to yield.
    """
    documents = read_documents(spec, source_index)
    for result in tokenize_documents(
        documents, tokenizer.path, tokenizer.renderer, tokenizer.num_processes
    ):
        if isinstance(result, LeftOut):
            report.leave_out(result.reason)
            continue
        report.documents += 1
        report.tokens += len(result)
        report.targets += int(result.loss_mask.sum())
        report.num_bytes += result.num_bytes
        yield result
    if report.documents == 0:
        raise nothing_left(report)


def write_blocks(
    documents: Iterator[TokenizedDocument],
    report: SourceReport,
    writer: BlockWriter,
    wanted: int | None,
) -> None:
    """Pack the documents of one source into blocks, until there are as many as wanted.

    Args:
        documents: of this source alone.
        report: counts what is cut and packed.
        writer: takes the blocks.
        wanted: how many; None for all.

    Raises:
        MissingTextError: there is no block.
    """
    writer.start_source()
    used = 0
    pieces = _pieces(documents, writer.seq_len, report)
    for block in islice(pack(pieces, writer.seq_len, writer.pad_id), wanted):
        writer.add(block)
        report.blocks += 1
        used += block.used
    if report.blocks == 0:
        raise nothing_left(report)
    report.fill = used / (report.blocks * writer.seq_len)


def nothing_left(report: SourceReport) -> MissingTextError:
    """The error of a source of which no document is in the split or can be learned from."""
    dropped = "; ".join(f"{count:,} left out: {why}" for why, count in report.dropped.items())
    message = f"{report.name}: no document to use in the split {report.split!r}"
    message += f" of {report.origin}" + (f" ({dropped})" if dropped else "")
    if NOT_IN_SEQ_LEN in report.dropped:
        hint = "Make sequences longer with --set data.seq_len=N."
    elif report.split == "all" or dropped:
        hint = "Give other text with --data PATH."
    else:
        hint = f"Use all of it with --data {report.name}@all, or change data.held_out."
    return MissingTextError(message, hint)


def _pieces(
    documents: Iterator[TokenizedDocument], seq_len: int, report: SourceReport
) -> Iterator[Piece]:
    for document in documents:
        try:
            pieces = cut(document, seq_len)
        except UnusableRowError as reason:
            report.leave_out(str(reason))
            report.documents -= 1
            report.tokens -= len(document)
            report.targets -= int(document.loss_mask.sum())
            report.num_bytes -= document.num_bytes
            continue
        if document.is_chat and len(document) > seq_len:
            report.truncated += 1
            report.tokens_cut += len(document) - seq_len
        report.windows += len(pieces) - 1
        yield from pieces
