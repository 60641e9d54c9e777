"""Near-duplicates: how much of a text stands in other texts, by runs of thirteen words."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

RUN_LENGTH = 13
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class RunHasher:
    """Turns a text into the hashes of its runs of words; the same text, the same hashes.

    Case, punctuation and spacing do not count. A text shorter than a run is one run.
    """

    def __init__(self, run_length: int = RUN_LENGTH) -> None:
        self._run_length = run_length
        self._word_ids: dict[str, int] = {}
        steps = np.arange(1, run_length + 1, dtype=np.uint64)
        self._weights = (steps * _MULTIPLIER) ** np.uint64(3) | np.uint64(1)

    def runs(self, text: str) -> NDArray[np.uint64]:
        """The distinct run hashes of a text."""
        words = re.findall(r"\w+", text.lower())
        known = self._word_ids
        ids = [known.setdefault(word, len(known) + 1) for word in words]
        ids += [0] * (self._run_length - len(ids))
        spread = np.asarray(ids, dtype=np.uint64) * _MULTIPLIER
        spread ^= spread >> np.uint64(29)
        windows = np.lib.stride_tricks.sliding_window_view(spread, self._run_length)
        return np.unique((windows * self._weights).sum(axis=1, dtype=np.uint64))


def containment(texts: Iterable[str], others: Iterable[str]) -> list[float]:
    """For each text, the share of its runs that stand anywhere in the others.

    Returns:
        One number in ``[0, 1]`` a text: 1 for a copy, 0 for a text with no run in common.
    """
    hasher = RunHasher()
    seen = [hasher.runs(text) for text in others]
    pool = np.unique(np.concatenate(seen)) if seen else np.empty(0, dtype=np.uint64)
    shares = []
    for text in texts:
        runs = hasher.runs(text)
        shares.append(float(_is_in(runs, pool).mean()))
    return shares


def _is_in(values: NDArray[np.uint64], pool: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each value is in a sorted pool (``np.isin`` would sort the pool every time)."""
    if not len(pool):
        return np.zeros(len(values), dtype=np.bool_)
    places = np.searchsorted(pool, values).clip(max=len(pool) - 1)
    return np.asarray(pool[places] == values)
