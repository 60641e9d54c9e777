"""``store.json``: what a teacher store holds, who said it, and the hash of every shard."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nexus_cli.errors import ArtifactError
from nexus_cli.io.hashing import sha256_json
from nexus_cli.io.location import Location
from nexus_cli.io.teacher_store.columns import Layout, Values
from nexus_cli.io.teacher_store.shard import Compression

FORMAT: Final = "nexus-topk/1"
FILENAME: Final = "store.json"
SHARDS: Final = "shards"
RANKS: Final = "vocab_rank.npy"


class StorePlan(BaseModel):
    """What decides the rows of a store; shards of different plans are never mixed.

    Attributes:
        teacher: fingerprint of the teacher: hashes of its index, configuration and weights.
        teacher_name: what the user called it.
        tokenizer: hash of the tokenizer file.
        chat_template: hash of the chat template, or ``None`` if the teacher has none.
        data: where the text came from, as the user's settings name it; for the record.
        data_digest: hash of the text, packed and in the order stored.
        sources: names of the data sources, by index.
        vocab_size: of the teacher's head.
        vocab_ranks: hash of the table of ranks.
        top_k: most entries kept a position.
        top_p: a position keeps as many entries as make up this mass; 1 keeps ``top_k`` always.
        min_k: fewest entries kept a position.
        values: how log-probabilities are coded.
        tail_samples: tokens drawn from the tail of each position.
        experts: layers and experts a token of the routing that is kept; zeros if it is not.
        dtype: in which the teacher ran.
        compression: of the Parquet columns.
        seq_len: tokens a row.
        batch_size: rows a step; the teacher saw them together.
        requested_steps: steps that were asked for.
        num_rows: rows that the text lasts for, at most what was asked for.
        rows_per_shard: every shard but the last has so many.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    teacher_name: str
    tokenizer: str
    chat_template: str | None
    data: dict[str, Any]
    data_digest: str
    sources: tuple[str, ...]
    vocab_size: int
    vocab_ranks: str
    top_k: int
    top_p: float
    min_k: int
    values: Values
    tail_samples: int
    experts: tuple[int, int]
    dtype: str
    compression: Compression
    seq_len: int
    batch_size: int
    requested_steps: int
    num_rows: int
    rows_per_shard: int

    @property
    def num_shards(self) -> int:
        """How many shards the rows make."""
        return -(-self.num_rows // self.rows_per_shard)

    @property
    def layout(self) -> Layout:
        """Of the columns."""
        return Layout(
            seq_len=self.seq_len,
            top_k=self.top_k,
            variable=self.top_p < 1,
            values=self.values,
            tail_samples=self.tail_samples,
            experts=self.experts,
        )

    def shard_rows(self, shard: int) -> range:
        """The rows of one shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def differing(self, other: StorePlan) -> list[str]:
        """Names of the fields in which ``other`` makes another store."""
        names = StorePlan.model_fields.keys() - {"teacher_name", "data"}
        return sorted(name for name in names if getattr(self, name) != getattr(other, name))


class ShardRecord(BaseModel):
    """One shard as ``store.json`` lists it.

    Attributes:
        file: name in the folder of shards.
        num_rows: sequences.
        num_targets: positions that hold a distribution.
        num_entries: kept entries of all of them.
        nll_sum: the teacher's negative log-likelihood of the targets, summed, in nats, before
            it was rounded.
        sha256: of the file.
        bytes: of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    num_rows: int
    num_targets: int
    num_entries: int
    nll_sum: float
    sha256: str
    bytes: int


class StoreManifest(BaseModel):
    """``store.json``: the plan, and the shards that came of it.

    Attributes:
        format: of the store.
        plan: what decided its rows.
        ended_early: why there are fewer rows than were asked for: ``text`` or ``disk``.
        shards: in the order of their rows; where the disk was full, some may be missing between.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["nexus-topk/1"] = FORMAT
    plan: StorePlan
    ended_early: Literal["text", "disk"] | None
    shards: tuple[ShardRecord, ...]

    @property
    def digest(self) -> str:
        """Identity of the contents."""
        return sha256_json([self.plan.vocab_ranks, *(shard.sha256 for shard in self.shards)])

    @property
    def num_rows(self) -> int:
        """Sequences in the store."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def actual_steps(self) -> int:
        """Whole batches in the store."""
        return self.num_rows // self.plan.batch_size

    @property
    def num_targets(self) -> int:
        """Positions that hold a distribution."""
        return sum(shard.num_targets for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def mean_k(self) -> float | None:
        """Kept entries a held position; ``None`` if none is held."""
        entries = sum(shard.num_entries for shard in self.shards)
        return entries / self.num_targets if self.num_targets else None

    @property
    def teacher_nll(self) -> float | None:
        """Mean over the targets, in nats; its exponential is the teacher's perplexity."""
        total = sum(shard.nll_sum for shard in self.shards)
        return total / self.num_targets if self.num_targets else None

    @property
    def first_rows(self) -> list[int]:
        """Number of the first row of every shard, and at the end the number of rows."""
        return list(accumulate((shard.num_rows for shard in self.shards), initial=0))


def read_manifest(folder: Location) -> StoreManifest | None:
    """``store.json`` of the folder, or ``None`` if there is none.

    Raises:
        ArtifactError: it is damaged, or of another format.
    """
    file = folder / FILENAME
    if not file.is_file():
        return None
    document = _document(file)
    if document.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder.shown} has the format {document.get('format')!r}; this nexus reads {FORMAT}",
            hint="run nexus precompute again with --force",
        )
    try:
        return StoreManifest.model_validate(document)
    except ValidationError as error:
        raise ArtifactError(f"{file.shown} is damaged: not a {FORMAT} file") from error


def _document(file: Location) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{file.shown} is damaged: it is no JSON") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{file.shown} is damaged: not a {FORMAT} file")
    return document
