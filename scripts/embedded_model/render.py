"""From a row to the text that a model reads: the harmony template, or the text as it stands."""

from __future__ import annotations

import json
from typing import Any

from rows import Row
from transformers import PreTrainedTokenizerFast

FIXED_DATE = "2026-11-01"
END_OF_TEXT = "<|endoftext|>"
START_OF_TEXT = "<|startoftext|>"


class Renderer:
    """Renders rows through a tokenizer's template with the date held fixed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        template = tokenizer.chat_template
        dated = template.replace('strftime_now("%Y-%m-%d")', f'"{FIXED_DATE}"')
        if dated == template:
            raise ValueError("the template asks for no date: is it GPT-OSS's?")
        self._template = dated
        self._tokenizer = tokenizer

    def render(self, row: Row) -> tuple[str, str]:
        """Render a row into its unscored opening and the rest.

        The opening of a chat is the system message, the same in every row; that of a text is
        the start token. Scoring leaves both out, or they would flatter every figure.
        """
        if "text" in row.fields:
            return START_OF_TEXT, row.fields["text"] + END_OF_TEXT
        text = self._tokenizer.apply_chat_template(
            harmony_messages(row.fields["messages"]),
            tools=row.fields.get("tools") or None,
            chat_template=self._template,
            tokenize=False,
        )
        opening, end, rest = str(text).partition("<|end|>")
        return opening + end, rest


def harmony_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the template wants them: one call a message, arguments as objects."""
    wanted: list[dict[str, Any]] = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        calls = kept.pop("tool_calls", None) or []
        if kept["role"] == "tool":
            kept["content"] = _parsed(kept["content"])
        if not calls:
            wanted.append(kept)
        for call in calls:
            function = call["function"]
            arguments = _parsed(function["arguments"])
            one = {"function": {"name": function["name"], "arguments": arguments}}
            wanted.append({**kept, "tool_calls": [one]})
            kept = {"role": kept["role"], "content": ""}
    return wanted


def _parsed(value: Any) -> Any:
    """A JSON string as what it holds, anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
