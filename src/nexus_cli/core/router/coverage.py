"""Which documents cover a vocabulary best within a budget of tokens.

The value of a set ``S`` of documents is ``F(S) = sum_v w_v log(1 + c_v(S))``, where ``c_v(S)``
counts token type ``v`` in ``S`` and ``w_v = p_v ** exponent`` grows with the type's share ``p_v``
of all candidates. The logarithm is concave, so a type pays less each time it is seen again, and
``F`` is monotone and submodular. With a long budget the counts tend to ``c_v ~ w_v``: an exponent
of 1 reproduces the candidates' own distribution (least ``KL(p || selected)``), 0 treats every type
alike, and 0.5 stands between.

Documents differ in length, so the greedy takes the highest gain *a token* until the budget is
reached. Including the document that reaches it, the result is worth at least ``1 - 1/e`` of the
best set within the budget: each step closes at least ``length / budget`` of the distance to that
set (Nemhauser, Wolsey and Fisher 1978 for equal lengths; Khuller, Moss and Naor 1999). Gains only
fall as the set grows, so a stale gain is an upper bound and few are computed again (Minoux 1978).

With ``batch_select`` above 1 the greedy works in rounds: all documents of a round are taken for
what they add to the rounds before, and not for what they add to each other. That computes fewer
gains; the bound above holds for rounds of one alone.
"""

from __future__ import annotations

import hashlib
import heapq
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: D documents, V vocabulary, M pairs of a document and a token type.

_DOCUMENTS_A_TASK = 512


@dataclass(frozen=True)
class TypeCounts:
    """Token types of many documents, as one sparse matrix in compressed rows.

    Attributes:
        start: where each document's pairs begin and the last one's end ``[D + 1]``, int64.
        type_M: token ids, ascending within a document, int32.
        count_M: how often the document holds them, int32, positive.
        digests: one per document; equal token sequences have equal digests.
    """

    start: NDArray[np.int64]
    type_M: NDArray[np.int32]
    count_M: NDArray[np.int32]
    digests: tuple[bytes, ...]

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.digests)

    @property
    def num_types(self) -> int:
        """One more than the largest token id, the length of vectors over the vocabulary."""
        return int(self.type_M.max()) + 1 if self.type_M.size else 0

    def of(self, document: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids of one document, and their counts."""
        pairs = slice(self.start[document], self.start[document + 1])
        return self.type_M[pairs], self.count_M[pairs]

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64."""
        ends = np.concatenate([[0], np.cumsum(self.count_M, dtype=np.int64)])
        lengths: NDArray[np.int64] = ends[self.start[1:]] - ends[self.start[:-1]]
        return lengths

    def total(self, documents: Iterable[int]) -> NDArray[np.int64]:
        """Counts of every token type over ``documents``, int64."""
        total = np.zeros(self.num_types, dtype=np.int64)
        for document in documents:
            types, counts = self.of(document)
            total[types] += counts
        return total

    def first_occurrences(self) -> list[int]:
        """The documents that do not repeat an earlier one, ascending."""
        first: dict[bytes, int] = {}
        for document, digest in enumerate(self.digests):
            first.setdefault(digest, document)
        return list(first.values())


def count_types(
    documents: Sequence[NDArray[np.integer[Any]]], *, num_processes: int = 1
) -> TypeCounts:
    """Count the token types of every document.

    Args:
        documents: token ids, one array a document; none empty.
        num_processes: worker processes; the result does not depend on it.

    Raises:
        ValueError: if a document is empty.
    """
    if any(len(ids) == 0 for ids in documents):
        raise ValueError("a document without tokens cannot be counted")
    starts = range(0, len(documents), _DOCUMENTS_A_TASK)
    tasks = [documents[start : start + _DOCUMENTS_A_TASK] for start in starts]
    if num_processes > 1 and len(tasks) > 1:
        # spawn: forking a process in which torch has started threads can deadlock.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(num_processes, len(tasks)), mp_context=context) as pool:
            rows = [row for part in pool.map(_count, tasks) for row in part]
    else:
        rows = [row for task in tasks for row in _count(task)]
    sizes = [len(types) for types, _, _ in rows]
    return TypeCounts(
        start=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
        type_M=np.concatenate([t for t, _, _ in rows] or [np.empty(0, np.int32)]),
        count_M=np.concatenate([c for _, c, _ in rows] or [np.empty(0, np.int32)]),
        digests=tuple(digest for _, _, digest in rows),
    )


def _count(
    documents: Sequence[NDArray[np.integer[Any]]],
) -> list[tuple[NDArray[np.int32], NDArray[np.int32], bytes]]:
    """Types, counts and digest of each document; runs in a worker."""
    rows = []
    for ids in documents:
        types, counts = np.unique(ids, return_counts=True)
        content = np.asarray(ids, dtype=np.int64).tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        rows.append((types.astype(np.int32), counts.astype(np.int32), digest))
    return rows


@dataclass(frozen=True)
class Selection:
    """Documents in the order in which they were taken.

    Attributes:
        documents: their indices.
        tokens: how many tokens they hold; at least the target unless the candidates ran out.
        value: ``F`` of the set.
        gains_computed: how often a gain was evaluated, for comparison with plain greedy.
    """

    documents: tuple[int, ...]
    tokens: int
    value: float
    gains_computed: int


def select_documents(
    counts: TypeCounts,
    *,
    target_tokens: int,
    exponent: float = 0.5,
    batch_select: int = 1,
    seed: int = 0,
) -> Selection:
    """Take documents by gain a token until they hold ``target_tokens``.

    A document that repeats an earlier one token for token is never taken. Equal gains are
    settled by a permutation drawn from ``seed``. A round ends early when the target is reached.

    Args:
        counts: the candidates.
        target_tokens: budget, positive.
        exponent: of the type weights, in [0, 1]; see the module's docstring.
        batch_select: documents taken before gains are computed again, positive.
        seed: of the order among equals.

    Raises:
        ValueError: if ``target_tokens``, ``exponent`` or ``batch_select`` is out of range.
    """
    if target_tokens < 1:
        raise ValueError(f"target_tokens must be positive, not {target_tokens}")
    if batch_select < 1:
        raise ValueError(f"batch_select must be positive, not {batch_select}")
    unique = counts.first_occurrences()
    weight_V = type_weights(counts.total(unique), exponent)
    lengths_D = counts.lengths()
    tie_D = np.random.default_rng(seed).permutation(counts.num_documents)
    seen_V = np.zeros(counts.num_types, dtype=np.int64)

    def entry(document: int) -> tuple[float, int, int]:
        gain = marginal_gain(*counts.of(document), seen_V, weight_V)
        return -gain / float(lengths_D[document]), int(tie_D[document]), document

    queue = [entry(document) for document in unique]
    heapq.heapify(queue)
    computed, tokens, taken = len(queue), 0, list[int]()
    round_D = np.zeros(counts.num_documents, dtype=np.int64)  # in which each gain was computed
    while queue and tokens < target_tokens:
        best = queue[0][2]
        now = len(taken) // batch_select
        if round_D[best] < now:  # others were taken since; it may no longer be the best
            heapq.heapreplace(queue, entry(best))
            round_D[best] = now
            computed += 1
            continue
        heapq.heappop(queue)
        taken.append(best)
        tokens += int(lengths_D[best])
        if len(taken) % batch_select == 0:  # until then, no gain knows of this round
            for document in taken[-batch_select:]:
                types, type_counts = counts.of(document)
                seen_V[types] += type_counts
    value = float((weight_V * np.log1p(counts.total(taken))).sum())
    return Selection(tuple(taken), tokens, value, computed)


def type_weights(total_V: NDArray[np.int64], exponent: float) -> NDArray[np.float64]:
    """Weights ``p_v ** exponent`` of the types that occur, 0 for the others ``[V]``.

    Raises:
        ValueError: if ``exponent`` is outside [0, 1].
    """
    if not 0.0 <= exponent <= 1.0:
        raise ValueError(f"exponent must lie in [0, 1], not {exponent}")
    share_V = total_V / max(1, int(total_V.sum()))
    return np.where(total_V > 0, share_V**exponent, 0.0)


def marginal_gain(
    types: NDArray[np.int32],
    type_counts: NDArray[np.int32],
    seen_V: NDArray[np.int64],
    weight_V: NDArray[np.float64],
) -> float:
    """What a document adds to ``F`` when each type ``v`` was seen ``seen_V[v]`` times."""
    # log(1 + c + n) - log(1 + c), written so that it falls with c in floating point too.
    growth = np.log1p(type_counts / (1.0 + seen_V[types]))
    return float((weight_V[types] * growth).sum())
