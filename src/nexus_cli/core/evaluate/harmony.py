"""Read a harmony answer as it is generated: which channel speaks, and what it says.

``<|start|>assistant<|channel|>analysis<|message|>...<|end|>`` may come before
``<|start|>assistant<|channel|>final<|message|>...<|return|>``; the prompt ends with
``<|start|>assistant``. A tokenizer without these marks gives plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

FINAL, RAW = "final", "raw"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8  # tokens; what is still unreadable then is no character
LONGEST_HEADER = 24  # tokens; longer ones are words of a model that does not speak harmony

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Piece:
    """Some text of a channel: ``final``, ``analysis``, ``commentary``, or ``raw``."""

    channel: str
    text: str


@dataclass
class HarmonyReader:
    """Turns tokens into pieces of text.

    Attributes:
        marks: The control tokens by id.
        decode: Turns tokens into text.
    """

    marks: dict[int, str]
    decode: Decode
    _header: list[int] = field(default_factory=list)
    _pending: list[int] = field(default_factory=list)
    _channel: str = ""
    _in_header: bool = True

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> HarmonyReader:
        """A reader that knows the tokenizer's control tokens."""
        marks = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        knows = "<|message|>" in marks.values()
        reader = cls(marks, lambda ids: str(tokenizer.decode(ids)))
        if not knows:
            reader._channel, reader._in_header = FINAL, False
        return reader

    def read(self, token: int) -> list[Piece]:
        """The text that this token completes, if any."""
        mark = self.marks.get(token)
        if mark is None:
            return self._read_word(token)
        pieces = self._rest()
        if mark in ("<|start|>", "<|channel|>"):
            self._header, self._in_header = [], True
        elif mark == "<|message|>":
            words = self.decode(self._header).split()
            self._channel = words[0] if words else FINAL
            self._header, self._in_header = [], False
        elif mark == "<|end|>":
            self._header, self._in_header = [], True
        return pieces

    def _read_word(self, token: int) -> list[Piece]:
        if self._in_header:
            self._header.append(token)
            if len(self._header) <= LONGEST_HEADER:
                return []
            self._channel, self._in_header = RAW, False
            self._pending, self._header = self._header, []
        else:
            self._pending.append(token)
        return self._readable()

    def finish(self) -> list[Piece]:
        """What is left when no more tokens come: a header that led to no message is shown raw."""
        pieces = self._rest()
        if self._in_header and self._header:
            pieces.append(Piece(RAW, self.decode(self._header)))
        return pieces

    def _readable(self) -> list[Piece]:
        text = self.decode(self._pending)
        if text.endswith(UNFINISHED) and len(self._pending) < LONGEST_CHARACTER:
            return []
        self._pending = []
        return [Piece(self._channel, text)] if text else []

    def _rest(self) -> list[Piece]:
        text = self.decode(self._pending) if self._pending else ""
        self._pending = []
        return [Piece(self._channel, text)] if text else []
