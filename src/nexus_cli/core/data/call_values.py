"""Which characters of a rendered tool call are values: the part that cannot be looked up.

Names of tools and arguments stand in the prompt, and the JSON frame is fixed. What tells a model
that can call tools from one that cannot is whether it predicts the values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Span = tuple[int, int]


def value_spans(arguments: Any) -> tuple[str, list[Span]]:
    """Write arguments as chat templates do, and say where the values are.

    Args:
        arguments: what JSON can hold.

    Returns:
        ``json.dumps(arguments, ensure_ascii=False)`` and the character spans ``[start, end)`` of
        its strings (without quotes), numbers, booleans and nulls; never of keys.
    """
    text, spans = "", []
    for piece, is_value in _pieces(arguments):
        if is_value and piece:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


def argument_value_spans(
    rendered: str, assistant_spans: Sequence[Span], messages: Sequence[Mapping[str, Any]]
) -> list[Span]:
    """Find the values of every tool call's arguments in a rendered conversation.

    A call ends an assistant's span, and comes after what was thought before it; so both are
    walked from the back, and a thought that quotes the same JSON is not taken for the call.

    Args:
        rendered: the whole conversation as the template writes it.
        assistant_spans: character spans that an assistant wrote, in order.
        messages: the conversation.

    Returns:
        Character spans of the values, in order.
    """
    found: list[Span] = []
    place = len(assistant_spans) - 1
    for function in reversed(_called(messages)):
        text, spans = value_spans(function["arguments"])
        while place >= 0:
            first, last = assistant_spans[place]
            place -= 1
            start = rendered.rfind(text, first, last)
            closes = "}" not in rendered[start + len(text) : last]
            if start >= 0 and closes and rendered.find(function["name"], first, start) >= 0:
                found += [(start + begin, start + end) for begin, end in reversed(spans)]
                break
    return found[::-1]


def _called(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [call["function"] for message in messages for call in message.get("tool_calls", ())]


def _pieces(value: Any) -> Iterator[tuple[str, bool]]:
    if isinstance(value, Mapping):
        yield "{", False
        for number, (key, item) in enumerate(value.items()):
            # A key that is no string becomes one, as json.dumps does it.
            frame = json.dumps({key: 0}, ensure_ascii=False)[1:-2]
            yield (", " if number else "") + frame, False
            yield from _pieces(item)
        yield "}", False
    elif isinstance(value, list | tuple):
        yield "[", False
        for number, item in enumerate(value):
            yield (", " if number else ""), False
            yield from _pieces(item)
        yield "]", False
    elif isinstance(value, str):
        yield '"', False
        yield json.dumps(value, ensure_ascii=False)[1:-1], True
        yield '"', False
    else:
        yield json.dumps(value, ensure_ascii=False), True
