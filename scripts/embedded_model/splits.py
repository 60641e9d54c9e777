"""The one split into train and held-out, by group of kin and free of near-duplicates."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from groups import group_rows
from near_duplicates import containment
from rows import Row

MAX_CONTAINMENT = 0.2  # of a held-out row's runs of words that may stand in training rows
# Variants of one thing that are kept, on either side, where a file holds dozens of each: word
# problems of one template, questions on one passage. More would be learnt by heart.
MAX_ROWS_A_GROUP = {"gsm_symbolic_cot": 15, "qa_narrativeqa": 1}
MAX_GROUP_SHARE = 0.1  # a group with more of its file's rows than this is always trained on


@dataclass
class Split:
    """Rows to train on, rows held out, and rows on neither side.

    Attributes:
        train: rows a model may learn from.
        held_out: rows whose kin and near-duplicates are nowhere in ``train``.
        dropped: rows of held-out groups that came too close to a training row.
    """

    train: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)


def split_rows(rows: Iterable[Row], held_out_shares: Mapping[str, float]) -> Split:
    """Split rows by group, the same way in every process.

    Groups are ordered by a hash of their smallest uuid within their file, and held out until
    the file's share of characters is reached, so that every file is in the held-out set.

    Args:
        rows: the corpus.
        held_out_shares: by domain, the share of each file's characters to hold out.
    """
    by_file: dict[str, list[list[Row]]] = defaultdict(list)
    for group in map(_thinned, group_rows(rows)):
        by_file[min(f"{row.domain}/{row.stem}" for row in group)].append(group)
    split = Split()
    for name in sorted(by_file):
        _split_file(by_file[name], held_out_shares[name.split("/")[0]], split)
    return _without_near_duplicates(split)


def _split_file(groups: list[list[Row]], held_out_share: float, split: Split) -> None:
    sizes = [sum(len(row.content()) for row in group) for group in groups]
    total, wanted, taken = sum(sizes), held_out_share * sum(sizes), 0
    ordered = sorted(zip(groups, sizes, strict=True), key=lambda pair: _order(pair[0]))
    for group, size in ordered:
        fits = taken + size <= 1.5 * wanted or (taken == 0 and size <= MAX_GROUP_SHARE * total)
        if taken < wanted and fits:
            split.held_out += group
            taken += size
        else:
            split.train += group


def _thinned(group: list[Row]) -> list[Row]:
    limit = min(MAX_ROWS_A_GROUP.get(row.stem, len(group)) for row in group)
    return sorted(group, key=lambda row: row.uuid)[:limit]


def _order(group: list[Row]) -> str:
    return hashlib.sha256(min(row.uuid for row in group).encode()).hexdigest()


def _without_near_duplicates(split: Split) -> Split:
    shares = containment(
        (row.content() for row in split.held_out), (row.content() for row in split.train)
    )
    kept, dropped = [], []
    for row, share in zip(split.held_out, shares, strict=True):
        (kept if share <= MAX_CONTAINMENT else dropped).append(row)
    return Split(train=split.train, held_out=kept, dropped=dropped)
