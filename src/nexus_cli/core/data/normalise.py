"""One row of any known layout as a document, or the reason why it is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nexus_cli.core.data.document import Document
from nexus_cli.core.data.errors import BadRowError, UnusableRowError
from nexus_cli.core.data.messages import normalise_messages, parse_json
from nexus_cli.core.data.tool_schema import tools_of

CONVERSATIONS = ("messages", "conversations", "conversation")
PAIRS = (
    ("instruction", "output"),  # before input and output: here the input is optional context
    ("instruction", "response"),
    ("input", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
)
TEXTS = ("text", "content")
LAYOUTS = "messages, conversations, input and output, prompt and response, or text"

EMPTY_TEXT = "empty text"
EMPTY_CONVERSATION = "empty conversation"
LLAMA_TURN = re.compile(
    r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)(?:<\|eot_id\|>|\Z)", re.DOTALL
)
LLAMA_END = "<|eot_id|>"


def normalise(row: Any, *, source_index: int = 0) -> Document:
    """Read one row.

    Args:
        row: an object as a file or the hub gives it.
        source_index: which source it is from.

    Raises:
        UnusableRowError: the row is of a known layout and there is nothing to learn in it: its
            prompt is withheld, its answer empty. It is to be left out and counted.
        BadRowError: the row is of no known layout.
    """
    if not isinstance(row, Mapping):
        raise BadRowError(f"a row must be an object, not {type(row).__name__}")
    text = _plain_text(row)
    if text is not None:
        if not text.strip():
            raise UnusableRowError(EMPTY_TEXT)
        return Document(text=text, source_index=source_index)
    messages = normalise_messages(_raw_messages(row))
    return Document(messages=messages, tools=tools_of(row), source_index=source_index)


def _plain_text(row: Mapping[str, Any]) -> str | None:
    """The text of a row that is no conversation; None if it is one."""
    if any(row.get(key) for key in CONVERSATIONS) or _pair(row):
        return None
    for key in TEXTS:
        if key in row and isinstance(row[key], str | None):
            return row[key] or ""
    if any(key in row for key in CONVERSATIONS):
        raise UnusableRowError(EMPTY_CONVERSATION)
    keys = ", ".join(map(str, row)) or "none"
    raise BadRowError(f"a row without text; its keys: {keys}; expected {LAYOUTS}")


def _pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of the prompt and the answer, if the row has both."""
    return next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)


def _raw_messages(row: Mapping[str, Any]) -> list[Any]:
    for key in CONVERSATIONS:
        messages = parse_json(row.get(key))
        if messages:
            if not isinstance(messages, list):
                raise BadRowError(f"{key!r} must be a list of messages")
            return _with_system(row, messages)
    prompt_key, answer_key = _pair(row) or ("", "")
    messages = _prompt(row, prompt_key) + _answer(row[answer_key])
    return _with_system(row, messages)


def _prompt(row: Mapping[str, Any], key: str) -> list[Any]:
    """A prompt given as messages, as a Llama 3 prompt string, or as what a user said."""
    prompt = row[key]
    if isinstance(prompt, list):
        return list(prompt)
    text = "" if prompt is None else str(prompt)
    turns = [{"role": role, "content": said} for role, said in LLAMA_TURN.findall(text)]
    if turns:
        # The string ends where the answer is to begin.
        return [turn for turn in turns if turn["role"] != "assistant" or turn["content"].strip()]
    if key == "instruction" and row.get("input"):
        text = f"{text}\n\n{row['input']}"
    return [{"role": "user", "content": text}]


def _answer(answer: Any) -> list[Any]:
    if isinstance(answer, list):
        return list(answer)
    text = "" if answer is None else str(answer)
    return [{"role": "assistant", "content": text.removesuffix(LLAMA_END)}]


def _with_system(row: Mapping[str, Any], messages: Sequence[Any]) -> list[Any]:
    for key in ("system_prompt", "system"):
        if isinstance(row.get(key), str) and row[key].strip():
            return [{"role": "system", "content": row[key]}, *messages]
    return list(messages)
