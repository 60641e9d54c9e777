"""A document as token ids, with masks of what is learned from and of tool-call values."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, cast

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from nexus_cli.core.data.call_values import Span, argument_value_spans
from nexus_cli.core.data.document import Document, TokenizedDocument
from nexus_cli.core.data.errors import BadFileError, UnusableRowError
from nexus_cli.core.data.template import has_marks, with_fixed_date, with_marks

log = logging.getLogger(__name__)

# Shape letters in this file: T tokens of one document.

TRAINING_TEMPLATE = "chat_template_training.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    TRAINING_TEMPLATE,
)
END_OF_TEXT = "<|endoftext|>"

CONTROL_TOKENS = "text that spells the tokenizer's control tokens"
NOT_UNICODE = "text that is not valid Unicode"
REFUSED = "the chat template refuses it"
NO_TARGETS = "no token to learn from"


class Renderer:
    """Renders documents for one tokenizer and its chat template.

    Plain text is ``bos text end-of-text`` (each as far as the tokenizer has it), as language
    models are scored; control tokens spelled in it are read as ordinary text. A conversation is
    what the chat template writes, with the date held fixed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, training_template: str | None = None
    ) -> None:
        """Prepare the templates.

        Args:
            tokenizer: with a chat template, if conversations are to be rendered.
            training_template: the same template with generation marks; without it, the marks
                are put into the tokenizer's own where that is GPT-OSS's.
        """
        self.tokenizer = tokenizer
        self._training_template = training_template
        self._templates: tuple[str, str] | None = None
        self._control_ids = np.array(sorted(tokenizer.added_tokens_encoder.values()), np.int32)
        spelled = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spelled)) or "(?!)")

    @classmethod
    def from_folder(cls, path: Path) -> Renderer:
        """Load the tokenizer of a model folder; no code of it is run, no network used.

        Raises:
            BadFileError: there is no tokenizer, or it cannot be read.
        """
        file = path / "tokenizer.json"
        if not file.is_file():
            raise BadFileError(f"{path}: no tokenizer.json", "Name a complete model folder.")
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadFileError(f"{file}: not a readable tokenizer: {error}") from error
        training = path / TRAINING_TEMPLATE
        marked = training.read_text(encoding="utf-8") if training.is_file() else None
        return cls(tokenizer, marked)

    @property
    def pad_id(self) -> int:
        """The token that fills up a sequence; never a target."""
        return cast(int, self.tokenizer.pad_token_id or 0)

    def tokenize(self, document: Document) -> TokenizedDocument:
        """Turn one document into token ids and masks.

        Raises:
            UnusableRowError: the document cannot be rendered faithfully, or holds no target.
            BadFileError: it is a conversation and the tokenizer has no usable chat template.
        """
        if document.text is not None:
            return self._plain(document, document.text)
        return self._chat(document)

    def _plain(self, document: Document, text: str) -> TokenizedDocument:
        num_bytes = _utf8_length(text)
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        bos, end = self.tokenizer.bos_token_id, self._end_id()
        ids = [*_given(bos), *cast("list[int]", encoded["input_ids"]), *_given(end)]
        input_ids = np.array(ids, dtype=np.int32)
        targets = np.ones(len(ids), dtype=np.bool_)
        return self._document(document, input_ids, targets, np.zeros_like(targets), num_bytes)

    def _end_id(self) -> int | None:
        known = self.tokenizer.added_tokens_encoder.get(END_OF_TEXT)
        return known if known is not None else cast("int | None", self.tokenizer.eos_token_id)

    def _chat(self, document: Document) -> TokenizedDocument:
        messages = [dict(message) for message in document.messages or ()]
        tools = [dict(tool) for tool in document.tools] or None
        if self._control.search("\n".join(_strings([messages, tools]))):
            raise UnusableRowError(CONTROL_TOKENS)
        text, spans = self._render(messages, tools)
        _utf8_length(text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        input_ids = np.array(encoded["input_ids"], dtype=np.int32)
        values = argument_value_spans(text, spans, messages)
        written = "".join(text[start:end] for start, end in spans)
        return self._document(
            document,
            input_ids,
            tokens_in(offsets, spans, len(text)),
            tokens_in(offsets, values, len(text)),
            _utf8_length(self._control.sub("", written)),
        )

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans that an assistant wrote."""
        official, marked = self._prepared()
        try:
            plain, _ = self._apply(official, messages, tools, with_spans=False)
            text, spans = self._apply(marked, messages, tools, with_spans=True)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            log.debug("the chat template refuses a conversation: %s", error)
            raise UnusableRowError(REFUSED) from error
        if plain != text:
            raise BadFileError(
                f"{TRAINING_TEMPLATE} writes another text than the model's chat template",
                "Remove it, or make it the chat template with {% generation %} marks added.",
            )
        return text, spans

    def _apply(
        self,
        template: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        with_spans: bool,
    ) -> tuple[str, list[Span]]:
        """Apply a template as the tokenizer's own ``apply_chat_template`` does."""
        apply = cast(Any, chat_template_utils.render_jinja_template)
        texts, spans = apply(
            [messages],
            tools,
            chat_template=template,
            return_assistant_tokens_mask=with_spans,
            **self.tokenizer.special_tokens_map,
        )
        return str(texts[0]), [(int(start), int(end)) for start, end in (spans or [[]])[0]]

    def _prepared(self) -> tuple[str, str]:
        if self._templates is None:
            template = self.tokenizer.chat_template
            if not isinstance(template, str):
                raise BadFileError(
                    "the model has no chat template, and the text holds conversations",
                    "Put its chat_template.jinja into the model folder.",
                )
            training = self._training_template or template
            if self._training_template is not None and not has_marks(training):
                raise BadFileError(f"{TRAINING_TEMPLATE} holds no {{% generation %}} marks")
            self._templates = (with_fixed_date(template), with_fixed_date(with_marks(training)))
        return self._templates

    def _document(
        self,
        document: Document,
        input_ids: NDArray[np.int32],
        targets: NDArray[np.bool_],
        values: NDArray[np.bool_],
        num_bytes: int,
    ) -> TokenizedDocument:
        targets[:1] = False  # nothing comes before it to predict it from
        if not targets.any():
            raise UnusableRowError(NO_TARGETS)
        return TokenizedDocument(
            input_ids=input_ids,
            loss_mask=targets,
            value_mask=values & targets,
            num_bytes=num_bytes,
            source_index=document.source_index,
            id=document.id,
            is_chat=document.is_chat,
        )


def tokens_in(offsets: NDArray[np.int64], spans: list[Span], length: int) -> NDArray[np.bool_]:
    """Mark the tokens that share at least one character with a span.

    Args:
        offsets: int64 ``[T, 2]``, start and end character of each token.
        spans: character spans ``[start, end)``.
        length: characters of the text.

    Returns:
        bool ``[T]``.
    """
    inside = np.zeros(length + 1, dtype=np.int64)
    for start, end in spans:
        inside[start + 1 : end + 1] = 1
    before = np.cumsum(inside)
    return before[offsets[:, 1]] > before[offsets[:, 0]]


def _given(token: Any) -> list[int]:
    return [] if token is None else [int(token)]


def _utf8_length(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UnusableRowError(NOT_UNICODE) from error


def _strings(value: Any) -> list[str]:
    """Every string in a nested value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _strings(part)]
    return []
