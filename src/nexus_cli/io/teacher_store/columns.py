"""How rows become the columns of a shard, and back; docs/teacher-store.md lists the columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nexus_cli.io.teacher_store import quantise
from nexus_cli.io.teacher_store.arrays import (
    Columns,
    bits,
    bytes_of,
    count_type,
    from_two_planes,
    one_piece,
    positions,
    running,
    spread,
    starts_of,
    two_planes,
    unpacked,
    values_of,
)
from nexus_cli.io.teacher_store.id_planes import IdPlanes, VocabularyRanks
from nexus_cli.io.teacher_store.ragged import Ragged
from nexus_cli.io.teacher_store.rows import Kept, StoreRows, held_positions

# Shape letters in this file: B rows, S positions, K kept entries, T temperatures of the tail,
# D sampled tail tokens, L layers, A experts a token and layer, M held positions, N entries.

Values = Literal["codes", "float32"]

_TAILS = tuple(f"tail_{temperature}" for temperature in quantise.TEMPERATURES)


@dataclass(frozen=True)
class Layout:
    """What decides the columns of a store.

    Attributes:
        seq_len: tokens a row.
        top_k: most entries a position.
        variable: whether positions keep different numbers of entries.
        values: ``codes`` of a byte, or ``float32`` for exact comparisons.
        tail_samples: tokens drawn from the tail of each position.
        experts: layers and experts a token, ``(0, 0)`` if experts are not kept.
    """

    seq_len: int
    top_k: int
    variable: bool
    values: Values
    tail_samples: int = 0
    experts: tuple[int, int] = (0, 0)


class Codec:
    """Turns rows into columns and back."""

    def __init__(self, layout: Layout, ranks: VocabularyRanks) -> None:
        """Code rows of ``layout`` over the vocabulary of ``ranks``."""
        self.layout = layout
        self.ranks = ranks

    def encode(self, rows: StoreRows, seq_B: NDArray[np.int64]) -> pa.Table:
        """One Arrow row a sequence.

        Args:
            rows: of this layout.
            seq_B: numbers of the rows in the store.

        Raises:
            ValueError: the rows are not of this layout, or a position does not start at 0 or go
                on from the one before.
        """
        layout, kept, splits = self.layout, rows.kept, rows.splits
        if kept.ids_MK.shape != (splits[-1], layout.top_k):
            raise ValueError(f"{kept.ids_MK.shape} entries for {splits[-1]} positions")
        used_MK = np.isfinite(kept.logprobs_MK)
        count_M = used_MK.sum(1)
        columns: Columns = {
            "seq": pa.array(seq_B, pa.int64()),
            "source": pa.array(rows.source_B, pa.int16()),
            "starts": bits(starts_of(rows.position_ids_BS)),
            "loss_mask": bits(rows.loss_mask_BS),
        }
        if layout.variable:
            columns |= bytes_of("k", count_M.astype(count_type(layout.top_k)), splits)
        elif not (count_M == layout.top_k).all():
            raise ValueError("fewer entries than the layout says")
        columns |= self._ids("id", kept.ids_MK[used_MK], running(count_M)[splits])
        sure_MK = used_MK
        if layout.values == "float32":
            columns |= self._exact(kept, used_MK, count_M, splits)
        else:
            codes_MK = quantise.ratio_codes(kept.logprobs_MK)
            columns |= self._coded(kept, codes_MK, used_MK, count_M, splits)
            # A code at its end does not say the nll.
            sure_MK = used_MK & (codes_MK < quantise.LAST_CODE)
        columns |= self._text(rows, sure_MK)
        return pa.table(columns | self._extras(kept, splits))

    def _ids(self, name: str, ids_N: NDArray[np.int32], splits: NDArray[np.int64]) -> Columns:
        planes = self.ranks.planes(ids_N, splits)
        return {
            f"{name}_{field.name}": getattr(planes, field.name).column()
            for field in fields(IdPlanes)
        }

    def _text(self, rows: StoreRows, sure_MK: NDArray[np.bool_]) -> Columns:
        """The next tokens by their places among the kept, and their nll and the text if not kept.

        Most next tokens are kept, and then the distribution says id and nll of them already.

        Args:
            rows: to be coded.
            sure_MK: entries that say their token's nll.
        """
        kept, splits, tokens_BS = rows.kept, rows.splits, rows.input_ids_BS
        next_M = tokens_BS[:, 1:][rows.held_BS[:, :-1]]
        same_MK = (kept.ids_MK == next_M[:, None]) & sure_MK
        found_M = same_MK.any(1)
        place_type = count_type(self.layout.top_k)
        place_M = np.where(found_M, same_MK.argmax(1), np.iinfo(place_type).max).astype(place_type)
        unknown_BS = np.ones(tokens_BS.shape, np.bool_)
        unknown_BS[:, 1:][rows.held_BS[:, :-1]] = ~found_M
        columns = bytes_of("label", place_M, splits)
        columns |= self._ids("text", tokens_BS[unknown_BS], running(unknown_BS.sum(1)))
        missing = running(~found_M)[splits]
        if self.layout.values == "float32":
            return columns | bytes_of("nll", kept.nll_M[~found_M], missing)
        return columns | two_planes("nll", quantise.nll_codes(kept.nll_M[~found_M]), missing)

    def _exact(
        self,
        kept: Kept,
        used_MK: NDArray[np.bool_],
        count_M: NDArray[np.int64],
        splits: NDArray[np.int64],
    ) -> Columns:
        """Log-probabilities and tails in float32."""
        columns = bytes_of("logprob", kept.logprobs_MK[used_MK], running(count_M)[splits])
        for column, name in enumerate(_TAILS):
            columns |= bytes_of(name, kept.tails_MT[:, column], splits)
        return columns

    def _coded(
        self,
        kept: Kept,
        codes_MK: NDArray[np.uint8],
        used_MK: NDArray[np.bool_],
        count_M: NDArray[np.int64],
        splits: NDArray[np.int64],
    ) -> Columns:
        """Log-probabilities and tails as codes."""
        falls_MK = np.diff(codes_MK, axis=1)
        columns: Columns = {}
        for name, start, stop in _octaves(self.layout.top_k):
            falls = falls_MK[:, start - 1 : stop - 1][used_MK[:, start:stop]]
            ends = running(np.clip(count_M - start, 0, stop - start))[splits]
            columns[name] = Ragged(falls, ends).column()
        tails = quantise.tail_codes(kept.tails_MT, kept.logprobs_MK[:, 0])
        for name, codes_M in zip(_TAILS, tails, strict=True):
            columns |= two_planes(name, codes_M, splits)
        return columns

    def _extras(self, kept: Kept, splits: NDArray[np.int64]) -> Columns:
        columns: Columns = {}
        if self.layout.tail_samples:
            if kept.tail_samples_MD is None:
                raise ValueError("the layout has samples of the tail, these rows have none")
            drawn = kept.tail_samples_MD
            has_tail_M = drawn[:, 0] >= 0
            columns |= bytes_of("sampled", has_tail_M.view(np.uint8), splits)
            ends = running(has_tail_M)[splits] * drawn.shape[1]
            columns |= self._ids("sample", drawn[has_tail_M].reshape(-1), ends)
        if self.layout.experts[0]:
            if kept.experts_MLA is None:
                raise ValueError("the layout has experts, these rows have none")
            columns |= bytes_of("experts", kept.experts_MLA, splits)
        return columns

    def decode(self, table: pa.Table) -> StoreRows:
        """The rows of a table.

        Raises:
            ValueError: the columns do not fit each other or this layout.
            KeyError: a column is missing.
        """
        shape, top_k = (len(table), self.layout.seq_len), self.layout.top_k
        columns = {name: one_piece(table.column(name)) for name in table.column_names}
        loss_mask_BS = unpacked(columns["loss_mask"], shape)
        held_BS = held_positions(loss_mask_BS)
        held = int(np.count_nonzero(held_BS))
        used_MK: NDArray[np.bool_] | None = None
        if self.layout.variable:
            used_MK = np.arange(top_k) < values_of(columns["k"], count_type(top_k))[:, None]
        ids_MK = spread(self._ids_of("id", columns), used_MK, (held, top_k))
        logprobs_MK, tails_MT = self._values_from(columns, used_MK, held)
        place_M = values_of(columns["label"], count_type(top_k))
        found_M = place_M != np.iinfo(place_M.dtype).max
        label_M = np.flatnonzero(found_M) * top_k + place_M[found_M]
        return StoreRows(
            input_ids_BS=self._text_from(columns, held_BS, found_M, ids_MK.reshape(-1)[label_M]),
            position_ids_BS=positions(unpacked(columns["starts"], shape)),
            loss_mask_BS=loss_mask_BS,
            source_B=columns["source"].to_numpy().astype(np.int16),
            kept=Kept(
                ids_MK=ids_MK,
                logprobs_MK=logprobs_MK,
                tails_MT=tails_MT,
                nll_M=self._nll_from(columns, found_M, logprobs_MK.reshape(-1)[label_M]),
                tail_samples_MD=self._samples_from(columns, held),
                experts_MLA=self._experts_from(columns, held),
            ),
        )

    def _ids_of(self, name: str, columns: Columns) -> NDArray[np.int32]:
        parts = (Ragged.of(columns[f"{name}_{field.name}"]) for field in fields(IdPlanes))
        return self.ranks.ids(IdPlanes(*parts))

    def _text_from(
        self,
        columns: Columns,
        held_BS: NDArray[np.bool_],
        found_M: NDArray[np.bool_],
        labels: NDArray[np.int32],
    ) -> NDArray[np.int32]:
        known_BS = np.zeros(held_BS.shape, np.bool_)
        known_BS[:, 1:][held_BS[:, :-1]] = found_M
        tokens_BS = np.empty(held_BS.shape, np.int32)
        tokens_BS[known_BS] = labels
        tokens_BS[~known_BS] = self._ids_of("text", columns)
        return tokens_BS

    def _nll_from(
        self, columns: Columns, found_M: NDArray[np.bool_], logprobs: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        nll_M = np.empty(len(found_M), np.float32)
        nll_M[found_M] = -logprobs
        nll_M[~found_M] = (
            values_of(columns["nll"], np.float32)
            if self.layout.values == "float32"
            else quantise.nll_of(from_two_planes("nll", columns))
        )
        return nll_M

    def _values_from(
        self, columns: Columns, used_MK: NDArray[np.bool_] | None, held: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        top_k = self.layout.top_k
        if self.layout.values == "float32":
            logprobs_N = values_of(columns["logprob"], np.float32)
            logprobs_MK = spread(logprobs_N, used_MK, (held, top_k), filler=-np.inf)
            tails = [values_of(columns[name], np.float32) for name in _TAILS]
            return logprobs_MK, np.stack(tails, 1)
        codes_MK = np.zeros((held, top_k), np.uint8)
        for name, start, stop in _octaves(top_k):
            used_MX = None if used_MK is None else used_MK[:, start:stop]
            shape = held, stop - start
            codes_MK[:, start:stop] = spread(values_of(columns[name]), used_MX, shape)
        np.cumsum(codes_MK, axis=1, dtype=np.uint8, out=codes_MK)
        codes = [from_two_planes(name, columns) for name in _TAILS]
        return quantise.logprobs_of(codes_MK, used_MK, codes)

    def _samples_from(self, columns: Columns, held: int) -> NDArray[np.int32] | None:
        if not self.layout.tail_samples:
            return None
        samples_MD = np.full((held, self.layout.tail_samples), -1, np.int32)
        has_tail_M = values_of(columns["sampled"]).view(np.bool_)
        samples_MD[has_tail_M] = self._ids_of("sample", columns).reshape(-1, samples_MD.shape[1])
        return samples_MD

    def _experts_from(self, columns: Columns, held: int) -> NDArray[np.uint8] | None:
        if not self.layout.experts[0]:
            return None
        return values_of(columns["experts"]).reshape(held, *self.layout.experts)


def _octaves(top_k: int) -> Iterator[tuple[str, int, int]]:
    """Column, first and last place of the entries whose codes lie together.

    How far an entry falls below the one before depends on its place, so that a code of its own
    for each octave of places is shorter.
    """
    start = 1
    while start < top_k:
        yield f"ratio_{start}", start, min(2 * start, top_k)
        start *= 2
