"""What was read, dropped, cut and packed, source by source: nothing is left out in silence."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class SourceReport:
    """Counts of one source; a reader fills it in as it goes.

    Attributes:
        name: the source's name, path or hub id.
        split: train, held-out or all.
        origin: where the text came from: a folder, a file, or a hub id with its revision.
        documents: documents used.
        dropped: documents left out, by reason.
        truncated: chats whose end did not fit a block.
        windows: blocks that long plain texts were cut into, beyond the first of each.
        tokens: tokens of the documents used, before cutting.
        tokens_cut: tokens lost to truncation.
        targets: tokens counted in a loss.
        num_bytes: UTF-8 bytes that the targets spell.
        blocks: packed sequences.
        fill: share of the blocks' positions that hold text.
    """

    name: str
    split: str
    origin: str = ""
    documents: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    windows: int = 0
    tokens: int = 0
    tokens_cut: int = 0
    targets: int = 0
    num_bytes: int = 0
    blocks: int = 0
    fill: float = 0.0

    def leave_out(self, reason: str) -> None:
        """Count a row or document that is not used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def sentence(self) -> str:
        """The counts as one log line."""
        parts = [f"{self.name} ({self.split}): {self.documents:,} documents"]
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens")
        if self.blocks:
            parts.append(f"{self.blocks:,} sequences, {self.fill:.1%} full")
        if self.truncated:
            parts.append(f"{self.truncated:,} chats cut ({self.tokens_cut:,} tokens)")
        for reason, count in sorted(self.dropped.items()):
            parts.append(f"{count:,} left out: {reason}")
        return "; ".join(parts)


@dataclass(frozen=True)
class DataReport:
    """The counts of a mixture."""

    sources: tuple[SourceReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return {"sources": [asdict(source) for source in self.sources]}

    @property
    def tokens(self) -> int:
        """Tokens over all sources."""
        return sum(source.tokens for source in self.sources)
