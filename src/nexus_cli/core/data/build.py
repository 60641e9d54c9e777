"""Packed sequences made once: in memory, or in a cache that any number of ranks map."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_cli.core.data.assemble import TokenizerUse, tokenized_source, write_blocks
from nexus_cli.core.data.block_writer import BlockWriter
from nexus_cli.core.data.cache import (
    BuiltBlocks,
    blocks_digest,
    cache_key,
    read_entry,
    write_entry,
)
from nexus_cli.core.data.errors import DataError
from nexus_cli.core.data.reader import SourceSpec
from nexus_cli.core.data.report import DataReport
from nexus_cli.io.atomic import atomic_directory

if TYPE_CHECKING:
    from nexus_cli.core.distributed import World


@dataclass(frozen=True)
class Recipe:
    """All that decides what a set of blocks is.

    Attributes:
        specs: the sources.
        wanted: blocks of each source; None for all it has.
        tokenizer: what to tokenise with.
        seq_len: tokens a block.
    """

    specs: tuple[SourceSpec, ...]
    wanted: tuple[int | None, ...]
    tokenizer: TokenizerUse
    seq_len: int


def build_in_memory(recipe: Recipe) -> BuiltBlocks:
    """Read, tokenise and pack.

    Raises:
        DataError: a file is corrupt, or a source has nothing to use.
    """
    with BlockWriter(recipe.seq_len, recipe.tokenizer.renderer.pad_id, None) as writer:
        report = _pack_sources(recipe, writer)
        digest = blocks_digest(writer.hashes(), writer.counts, recipe.seq_len)
        return BuiltBlocks(writer.blocks_in_memory(), report, digest)


def build_through_cache(recipe: Recipe, cache_dir: Path, world: World | None) -> BuiltBlocks:
    """Open the cache's entry, made first if it is not there; memory stays bounded.

    Args:
        recipe: what to make.
        cache_dir: where entries are kept.
        world: rank 0 makes the entry while the others wait. A rank that does not see it (its
            node has its own disk) makes its own.

    Raises:
        DataError: a file is corrupt, or a source has nothing to use.
    """
    key = cache_key(recipe.specs, recipe.tokenizer.path, recipe.seq_len, recipe.wanted)
    folder = cache_dir / key[:32]
    follows = world is not None and not world.is_main
    if world is not None and follows:
        world.barrier()
    try:
        built = read_entry(folder, verify=not follows) or _make_entry(recipe, folder)
    except DataError:
        if world is not None and not follows:
            world.barrier()  # the others find no entry, try it, and say the same
        raise
    if world is not None and not follows:
        world.barrier()
    return built


def _make_entry(recipe: Recipe, folder: Path) -> BuiltBlocks:
    pad_id = recipe.tokenizer.renderer.pad_id
    own = folder.with_name(f"{folder.name}-{os.getpid()}")
    with atomic_directory(own) as temporary:
        with BlockWriter(recipe.seq_len, pad_id, temporary) as writer:
            report = _pack_sources(recipe, writer)
        write_entry(
            temporary,
            report=report,
            hashes=writer.hashes(),
            counts=writer.counts,
            seq_len=recipe.seq_len,
        )
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    try:
        own.rename(folder)
    except OSError:  # another process made the same entry meanwhile
        shutil.rmtree(own)
    built = read_entry(folder, verify=False)
    if built is None:
        raise ValueError(f"the text cache {folder} vanished while it was made")
    return built


def _pack_sources(recipe: Recipe, writer: BlockWriter) -> DataReport:
    reports = [spec.report() for spec in recipe.specs]
    for index, (spec, report) in enumerate(zip(recipe.specs, reports, strict=True)):
        documents = tokenized_source(spec, index, report, recipe.tokenizer)
        write_blocks(documents, report, writer, recipe.wanted[index])
    return DataReport(tuple(reports))
