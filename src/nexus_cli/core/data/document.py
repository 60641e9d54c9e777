"""One piece of text, as every source is read: plain text or a conversation, known by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: T tokens of one document.

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """Plain text, or a conversation that any chat template can render.

    Attributes:
        text: the text as it stands; None for a conversation.
        messages: ``role``, ``content``, and where they are ``thinking`` and ``tool_calls``
            (exactly one call, its arguments an object); None for plain text.
        tools: JSON schemas wrapped as ``{"type": "function", "function": {...}}``.
        source_index: which of the caller's sources it is from.
        id: hash of the content alone, so the same text has the same id in any source or file.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    tools: tuple[Message, ...] = ()
    source_index: int = 0
    id: str = field(default="")

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ValueError("a document is either text or messages")
        if not self.id:
            object.__setattr__(self, "id", content_hash(self.text, self.messages, self.tools))

    @property
    def is_chat(self) -> bool:
        """Whether this is a conversation."""
        return self.messages is not None

    @property
    def words(self) -> str:
        """Everything that somebody wrote in it, without template, tools or names."""
        if self.messages is None:
            return self.text or ""
        fields = (message.get(key) for message in self.messages for key in ("thinking", "content"))
        return "\n".join(value for value in fields if isinstance(value, str) and value)


@dataclass(frozen=True)
class TokenizedDocument:
    """One document as token ids, whole: neither cut nor padded.

    Attributes:
        input_ids: int32 ``[T]``.
        loss_mask: bool ``[T]``; True where the token at this position is a target. Assistant
            tokens of a chat; every token but the first of plain text. Never the first token.
        value_mask: bool ``[T]``; True for tokens inside the values (not the keys, not the JSON
            frame) of tool-call arguments. A subset of ``loss_mask``.
        num_bytes: UTF-8 bytes of the text that the targets spell; control tokens count as 0.
        source_index: which of the caller's sources it is from.
        id: the document's content hash.
        is_chat: whether it was a conversation.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    value_mask: NDArray[np.bool_]
    num_bytes: int
    source_index: int
    id: str
    is_chat: bool

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class LeftOut:
    """A row or document that is not used, and why; it travels in its place to be counted."""

    reason: str


def content_hash(
    text: str | None, messages: Sequence[Message] | None, tools: Sequence[Message]
) -> str:
    """SHA-256 (hex) of a document's content as canonical JSON."""
    content = text if text is not None else [list(messages or ()), list(tools)]
    # ASCII escapes: a lone surrogate from broken JSON cannot be encoded as UTF-8.
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def is_held_out(document_id: str, share: float) -> bool:
    """Whether a document is in the held-out split: a pure function of its content.

    Args:
        document_id: hex content hash, as in :attr:`Document.id`.
        share: share of documents to hold out, in ``[0, 1]``.
    """
    return int(document_id[:16], 16) < share * 2**64
