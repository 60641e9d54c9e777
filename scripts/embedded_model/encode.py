"""Rows as token arrays, with what scoring needs: where each begins to count, and its bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from render import Renderer
from rows import Row
from transformers import PreTrainedTokenizerFast

_SPECIAL = re.compile(r"<\|[a-z_0-9]+\|>")
_BATCH = 1000


@dataclass(frozen=True)
class Documents:
    """Tokenised rows, end to end.

    Attributes:
        tokens: uint16 ``[tokens]`` of all documents.
        ends: int64 ``[documents]``, where each one ends.
        openings: int64 ``[documents]``, leading tokens of each that are context only.
        num_bytes: int64 ``[documents]``, UTF-8 bytes of what is scored, specials left out.
        num_rendered_bytes: int64 ``[documents]``, UTF-8 bytes of all of it, specials spelt out.
        is_text: bool ``[documents]``, plain text rather than chat.
        labels: the ``domain/file`` of each document.
    """

    tokens: NDArray[np.uint16]
    ends: NDArray[np.int64]
    openings: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    num_rendered_bytes: NDArray[np.int64]
    is_text: NDArray[np.bool_]
    labels: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.ends, prepend=0)

    def document(self, index: int) -> NDArray[np.uint16]:
        """The tokens of one document."""
        end = int(self.ends[index])
        return self.tokens[end - int(self.lengths()[index]) : end]

    def without_domain(self, domain: str) -> Documents:
        """The documents of every other domain."""
        kept = [i for i, name in enumerate(self.labels.tolist()) if name.split("/")[0] != domain]
        return Documents(
            tokens=np.concatenate([self.document(index) for index in kept]),
            ends=np.cumsum(self.lengths()[kept]),
            openings=self.openings[kept],
            num_bytes=self.num_bytes[kept],
            num_rendered_bytes=self.num_rendered_bytes[kept],
            is_text=self.is_text[kept],
            labels=self.labels[kept],
        )

    def save(self, path: Path) -> None:
        """Write all arrays into one ``.npz``."""
        np.savez_compressed(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


def encode_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> Documents:
    """Render and tokenise rows, in order."""
    renderer = Renderer(tokenizer)
    pieces: list[NDArray[np.uint16]] = []
    openings: list[int] = []
    num_bytes: list[int] = []
    num_rendered_bytes: list[int] = []
    for start in range(0, len(rows), _BATCH):
        rendered = [renderer.render(row) for row in rows[start : start + _BATCH]]
        heads = tokenizer([head for head, _ in rendered], add_special_tokens=False)["input_ids"]
        rests = tokenizer([rest for _, rest in rendered], add_special_tokens=False)["input_ids"]
        pieces += [np.asarray(a + b, dtype=np.uint16) for a, b in zip(heads, rests, strict=True)]
        openings += [len(head) for head in heads]
        num_bytes += [len(_SPECIAL.sub("", rest).encode()) for _, rest in rendered]
        num_rendered_bytes += [len((head + rest).encode()) for head, rest in rendered]
    return Documents(
        tokens=np.concatenate(pieces),
        ends=np.cumsum([len(piece) for piece in pieces], dtype=np.int64),
        openings=np.asarray(openings, dtype=np.int64),
        num_bytes=np.asarray(num_bytes, dtype=np.int64),
        num_rendered_bytes=np.asarray(num_rendered_bytes, dtype=np.int64),
        is_text=np.asarray(["text" in row.fields for row in rows]),
        labels=np.asarray([f"{row.domain}/{row.stem}" for row in rows]),
    )
