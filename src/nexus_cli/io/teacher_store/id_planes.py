"""Token ids as byte planes of their frequency rank.

Ids are most of a store's bytes. A token's rank by frequency is mostly small, so its high byte
costs little; the ranks from 65,280 on, which are rare, go to planes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nexus_cli.io.teacher_store.ragged import Ragged, chosen

# Shape letters in this file: V vocabulary, N ids, F ids that are far.

PAGE: Final = 256
FAR: Final = 255  # in the plane of pages: the page is in the far planes
MAX_VOCABULARY: Final = PAGE * (FAR + 65536)


@dataclass(frozen=True)
class IdPlanes:
    """Ids of several rows in four planes of bytes.

    Attributes:
        page: rank // 256 of every id; 255 if that is 255 or more.
        low: rank % 256.
        far_low: low byte of rank // 256 - 255 of the far ids.
        far_high: its high byte.
    """

    page: Ragged
    low: Ragged
    far_low: Ragged
    far_high: Ragged


class VocabularyRanks:
    """The order of the vocabulary by frequency, and back.

    Args:
        id_V: int32, the id of each rank: a permutation of ``0 .. V - 1``.

    Raises:
        ValueError: it is no permutation, or over 16,842,496 long.
    """

    def __init__(self, id_V: NDArray[np.int32]) -> None:
        size = len(id_V)
        if size > MAX_VOCABULARY:
            raise ValueError(f"{size} tokens; the format holds {MAX_VOCABULARY}")
        if id_V.dtype != np.int32 or not np.array_equal(np.sort(id_V), np.arange(size)):
            raise ValueError("the vocabulary's ranks are no permutation of its ids")
        self.id_V = id_V
        self._rank_V = np.empty_like(id_V)
        self._rank_V[id_V] = np.arange(size, dtype=np.int32)
        # By id, so that a plane is one look-up in a table that stays in the cache.
        self._page_V = np.minimum(self._rank_V // PAGE, FAR).astype(np.uint8)
        self._low_V = (self._rank_V % PAGE).astype(np.uint8)

    @classmethod
    def by_count(cls, count_V: NDArray[np.int64]) -> VocabularyRanks:
        """Most frequent first; of equals, the lower id: in a BPE vocabulary it is likelier."""
        return cls(np.argsort(-count_V, kind="stable").astype(np.int32))

    def __len__(self) -> int:
        return len(self.id_V)

    def planes(self, ids: NDArray[np.int32], splits: NDArray[np.int64]) -> IdPlanes:
        """Split the ids ``[N]`` of rows that end at ``splits``.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self):
            raise ValueError("an id is outside the vocabulary")
        # Checked above, so that the look-ups need not: that takes a third of their time.
        ids_N = ids.astype(np.intp)
        page_N = self._page_V.take(ids_N, mode="clip")
        far_N = page_N == FAR
        far_F = self._rank_V[ids_N[far_N]] // PAGE - FAR
        far_splits = chosen(far_N, splits)
        return IdPlanes(
            page=Ragged(page_N, splits),
            low=Ragged(self._low_V.take(ids_N, mode="clip"), splits),
            far_low=Ragged((far_F & 0xFF).astype(np.uint8), far_splits),
            far_high=Ragged((far_F >> 8).astype(np.uint8), far_splits),
        )

    def ids(self, planes: IdPlanes) -> NDArray[np.int32]:
        """Put the ids ``[N]`` together again.

        Raises:
            ValueError: the planes do not fit each other or the vocabulary.
        """
        page_N = planes.page.flat
        rank_N = page_N.astype(np.int32)
        far_F = (page_N == FAR).nonzero()[0]
        if not len(far_F) == len(planes.far_low.flat) == len(planes.far_high.flat):
            raise ValueError("the far planes do not fit the plane of pages")
        if len(far_F):
            high_F = planes.far_high.flat.astype(np.int32) << 8
            rank_N[far_F] += high_F | planes.far_low.flat
        rank_N <<= 8
        rank_N |= planes.low.flat
        if len(rank_N) and int(rank_N.max()) >= len(self.id_V):
            raise ValueError("a rank is outside the vocabulary")
        return self.id_V.take(rank_N.astype(np.intp), mode="clip")
