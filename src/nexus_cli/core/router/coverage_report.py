"""What a selection of documents covers, in all and by source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_cli.core.router.coverage import Selection, TypeCounts

# Shape letters in this file: D documents, V vocabulary.


def describe_coverage(
    counts: TypeCounts,
    selection: Selection,
    *,
    source_D: Sequence[int],
    source_names: Sequence[str],
    vocab_size: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Describe a selection in plain numbers, ready for JSON.

    ``distribution_covered`` is the share of all candidate tokens whose type the selection
    holds at least once; ``kl_from_candidates`` is KL(candidates || selection) in nats with
    half a token added to every candidate type, so that a type left out counts. The same
    figures of a random selection of as many tokens stand beside them.

    Args:
        counts: the candidates.
        selection: what was taken of them.
        source_D: index of each document's source.
        source_names: names of the sources.
        vocab_size: token types the model knows.
        seed: of the random selection.

    Raises:
        ValueError: if a document has no source.
    """
    if len(source_D) != counts.num_documents:
        raise ValueError(f"{counts.num_documents} documents, but {len(source_D)} sources")
    unique = counts.first_occurrences()
    lengths_D = counts.lengths()
    candidates_V = counts.total(unique)
    chosen_V = counts.total(selection.documents)
    random_V = counts.total(_random_documents(unique, lengths_D, selection.tokens, seed))
    return {
        "candidates": {
            "documents": counts.num_documents,
            "duplicates_removed": counts.num_documents - len(unique),
            "tokens": int(candidates_V.sum()),
            "token_types": int(np.count_nonzero(candidates_V)),
        },
        "selected": {
            "documents": len(selection.documents),
            "tokens": selection.tokens,
            "objective": selection.value,
            "gains_computed": selection.gains_computed,
            **_covered(candidates_V, chosen_V, vocab_size),
        },
        "random_selection": _covered(candidates_V, random_V, vocab_size),
        "sources": {
            name: _source(counts, selection, unique, lengths_D, chosen_V, source_D, index)
            for index, name in enumerate(source_names)
        },
    }


def _covered(
    candidates_V: NDArray[np.int64], chosen_V: NDArray[np.int64], vocab_size: int
) -> dict[str, Any]:
    types = int(np.count_nonzero(chosen_V))
    return {
        "token_types": types,
        "share_of_candidate_types": types / max(1, int(np.count_nonzero(candidates_V))),
        "share_of_vocabulary": types / vocab_size,
        "distribution_covered": _distribution_covered(candidates_V, chosen_V),
        "kl_from_candidates": _kl(candidates_V, chosen_V),
    }


def _source(
    counts: TypeCounts,
    selection: Selection,
    unique: Sequence[int],
    lengths_D: NDArray[np.int64],
    chosen_V: NDArray[np.int64],
    source_D: Sequence[int],
    source: int,
) -> dict[str, Any]:
    own_V = counts.total(d for d in unique if source_D[d] == source)
    taken = [d for d in selection.documents if source_D[d] == source]
    own_types = int(np.count_nonzero(own_V))
    return {
        "candidate_documents": sum(1 for s in source_D if s == source),
        "candidate_tokens": int(own_V.sum()),
        "candidate_token_types": own_types,
        "selected_documents": len(taken),
        "selected_tokens": int(lengths_D[taken].sum()),
        "share_of_candidate_types": int(np.count_nonzero(own_V * chosen_V)) / max(1, own_types),
        "distribution_covered": _distribution_covered(own_V, chosen_V),
    }


def _distribution_covered(of_V: NDArray[np.int64], by_V: NDArray[np.int64]) -> float:
    """Share of the tokens in ``of_V`` whose type occurs in ``by_V``."""
    return float(of_V[by_V > 0].sum() / max(1, of_V.sum()))


def _kl(candidates_V: NDArray[np.int64], chosen_V: NDArray[np.int64]) -> float:
    present = candidates_V > 0
    if not present.any():
        return 0.0
    wanted = candidates_V[present] / candidates_V.sum()
    smoothed = chosen_V[present] + 0.5
    return float((wanted * np.log(wanted * smoothed.sum() / smoothed)).sum())


def _random_documents(
    unique: Sequence[int], lengths_D: NDArray[np.int64], tokens: int, seed: int
) -> list[int]:
    """Documents in a seeded order until they hold ``tokens``."""
    order = np.random.default_rng(seed).permutation(np.asarray(unique, dtype=np.int64))
    before = np.cumsum(lengths_D[order]) - lengths_D[order]
    return [int(document) for document in order[before < tokens]]
