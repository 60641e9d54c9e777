"""What ``nexus collect`` will run: texts chosen for coverage, in batches, one plan for all."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_cli.config.collect import CollectConfig
from nexus_cli.core.data.document import TokenizedDocument
from nexus_cli.core.router.batching import plan_batches
from nexus_cli.core.router.coverage import Selection, count_types, select_documents
from nexus_cli.core.router.coverage_report import describe_coverage
from nexus_cli.errors import ResourceError
from nexus_cli.io.hashing import sha256_json
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.pipeline.inputs import Artifact
from nexus_cli.pipeline.text import load_tokenized

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectPlan:
    """The work.

    Attributes:
        sequences: token ids of the chosen texts, int32.
        batches: indices into ``sequences``, the longest first.
        pad_id: fills the batches.
        digest: of everything that the statistics depend on; partial ones carry it.
        text_digest: of the documents that were read.
        report: coverage and counts, for the collection report.
    """

    sequences: tuple[NDArray[np.int32], ...]
    batches: tuple[tuple[int, ...], ...]
    pad_id: int
    digest: str
    text_digest: str
    report: dict[str, Any]


def make_plan(config: CollectConfig, model: Artifact, shape: ModelShape) -> CollectPlan:
    """Read text, choose from it, and form batches; for the main rank alone.

    Raises:
        NexusError: text is missing or damaged (as :func:`load_tokenized`).
        ResourceError: no text is long enough.
    """
    text = load_tokenized(
        config.data,
        model.path,
        default_split="train",
        max_documents=config.max_candidates,
        num_processes=config.runtime.num_processes,
    )
    candidates = cut_up(text.documents, config)
    if not candidates:
        raise ResourceError(
            f"no text of {config.min_seq_length} tokens or more among {len(text.documents)}",
            hint="give other text with --data, or --set min_seq_length=N",
        )
    log.info(
        "choosing %s tokens from %s texts", f"{config.target_tokens:,}", f"{len(candidates):,}"
    )
    counts = count_types([ids for ids, _ in candidates], num_processes=config.runtime.num_processes)
    selection = select_documents(
        counts,
        target_tokens=config.target_tokens,
        exponent=config.coverage_exponent,
        batch_select=config.batch_select,
        seed=config.seed,
    )
    _warn_if_short(config, selection)
    coverage = describe_coverage(
        counts,
        selection,
        source_D=[source for _, source in candidates],
        source_names=_names(config),
        vocab_size=shape.vocab_size,
        seed=config.seed,
    )
    sequences = tuple(candidates[index][0] for index in selection.documents)
    batches = tuple(plan_batches([len(ids) for ids in sequences], config.runtime.batch_size))
    return CollectPlan(
        sequences=sequences,
        batches=batches,
        pad_id=text.pad_id,
        digest=_digest(config, model, sequences, batches),
        text_digest=text.digest,
        report={
            "target_tokens": config.target_tokens,
            "target_reached": selection.tokens >= config.target_tokens,
            "batch_select": config.batch_select,
            "coverage": coverage,
            "text": text.report.as_dict(),
        },
    )


def cut_up(
    documents: Sequence[TokenizedDocument], config: CollectConfig
) -> list[tuple[NDArray[np.int32], int]]:
    """Candidates with their sources: windows of plain text, and the head of each chat.

    Every document's first window comes before any second one, so that ``max_candidates`` cuts
    the ends of long documents before it leaves out short ones.
    """
    length = config.max_seq_length
    windows = [
        (start // length, number, document.input_ids[start : start + length])
        for number, document in enumerate(documents)
        for start in range(0, 1 if document.is_chat else len(document), length)
    ]
    windows.sort(key=lambda window: window[:2])
    return [
        (ids, documents[number].source_index)
        for _, number, ids in windows
        if len(ids) >= config.min_seq_length
    ][: config.max_candidates]


def _warn_if_short(config: CollectConfig, selection: Selection) -> None:
    if selection.tokens < config.target_tokens:
        log.warning(
            "all candidates together hold %s of the %s tokens asked for; all of them are used "
            "(raise --max-candidates, or give more --data)",
            f"{selection.tokens:,}",
            f"{config.target_tokens:,}",
        )


def _names(config: CollectConfig) -> list[str]:
    """One name a source; a source that is named twice keeps both entries apart."""
    names: list[str] = []
    for source in config.data.sources:
        twin = names.count(source.name) + sum(n.startswith(f"{source.name} #") for n in names)
        names.append(f"{source.name} #{twin + 1}" if twin else source.name)
    return names


def _digest(
    config: CollectConfig,
    model: Artifact,
    sequences: Sequence[NDArray[np.int32]],
    batches: Sequence[tuple[int, ...]],
) -> str:
    content = hashlib.sha256()
    for ids in sequences:
        content.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return sha256_json(
        {
            "model": model.digest,
            "sequences": content.hexdigest(),
            "batches": batches,
            "dtype": config.dtype,
            "seed": config.seed,
            "reservoir": config.reservoir,
            "units": config.units,
        }
    )
