"""Messages of a conversation in the one form that every chat template renders faithfully.

Templates lose or garble much in silence: a second call in one message, arguments given as a
string, a system message in the middle. Each rule here answers one such case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nexus_cli.core.data.document import Message
from nexus_cli.core.data.errors import UnusableRowError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
WITHHELD = "-"  # stands for a prompt that the publisher may not show
REASONING_KEYS = ("thinking", "reasoning_content", "reasoning")
THINK = re.compile(r"^\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)

WITHHELD_PROMPT = "empty or withheld prompt"
EMPTY_ANSWER = "empty assistant turn"
NO_ANSWER = "no assistant turn"
NO_CALL = "tool result without a call before it"
NOT_TEXT = "content that is not text"
UNKNOWN_ROLE = "unknown role"
BAD_ARGUMENTS = "tool call without a name or with arguments that are not a JSON object"


def normalise_messages(raw: Sequence[Any]) -> tuple[Message, ...]:
    """Bring messages of any known spelling into one form.

    Args:
        raw: objects with ``role`` or ``from``, ``content`` or ``value``, and perhaps
            ``tool_calls``, ``function_call``, ``tool_call_id`` and reasoning.

    Returns:
        At most one system message, first; then user, assistant and tool messages, ending with
        an assistant's. An assistant message has ``content`` and perhaps ``thinking``, or one
        call with its arguments as an object and what was said beside it in ``thinking``.

    Raises:
        UnusableRowError: the conversation cannot be learned from.
    """
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for message in raw:
        role = _role(message)
        if role == "system":
            content = _text(message)
            system += [content] if content.strip() else []
        else:
            turns += _turns(role, message)
    turns = _one_call_at_a_time(turns)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()  # nothing to learn from what nobody answered
    if not turns:
        raise UnusableRowError(NO_ANSWER)
    _check_tool_results(turns)
    for turn in turns:
        turn.pop("id", None)
        turn.pop("calls", None)
    head = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return (*head, *turns)


def parse_json(value: Any) -> Any:
    """What a JSON string holds; any other value, and a string that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _role(message: Any) -> str:
    if not isinstance(message, Mapping):
        raise UnusableRowError(NOT_TEXT)
    role = ROLES.get(str(message.get("role") or message.get("from")).lower())
    if role is None:
        raise UnusableRowError(UNKNOWN_ROLE)
    return role


def _text(message: Mapping[str, Any]) -> str:
    """The content as one string; parts of a list are joined."""
    content = message.get("content")
    if content is None:
        content = message.get("value")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(_is_text_part(part) for part in content):
        return "".join(str(part["text"]) for part in content)
    raise UnusableRowError(NOT_TEXT)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _turns(role: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    if role == "assistant":
        return _assistant_turns(message)
    if role == "tool":
        return [{"role": "tool", "content": _result(message), "id": message.get("tool_call_id")}]
    content = _text(message)
    if content.strip() in ("", WITHHELD):
        raise UnusableRowError(WITHHELD_PROMPT)
    return [{"role": "user", "content": content}]


def _result(message: Mapping[str, Any]) -> Any:
    """A tool's result as the template's ``tojson`` wants it: an object, not its JSON text."""
    content = message.get("content")
    if isinstance(content, Mapping):
        return dict(content)
    text = _text(message)
    parsed = parse_json(text)
    return text if parsed is None else parsed


def _assistant_turns(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls = _calls(message)
    content = "" if message.get("from") == "function_call" else _text(message)
    thinking = [str(message[key]) for key in REASONING_KEYS if message.get(key)][:1]
    inline = THINK.match(content)
    if inline:
        thinking.append(inline[1])
        content = content[inline.end() :]
    if calls:  # beside a call, templates take either content or thinking, never both
        thinking, content = [*thinking, content], ""
    joined = "\n\n".join(part.strip() for part in thinking if part.strip())
    said = {"thinking": joined} if joined else {}
    if not calls:
        if not content.strip() and not said:
            raise UnusableRowError(EMPTY_ANSWER)
        return [{"role": "assistant", "content": content, **said}]
    first = {
        "role": "assistant",
        "content": "",
        **said,
        **_call_turn(calls[0]),
        "calls": len(calls),
    }
    rest = [{"role": "assistant", "content": "", **_call_turn(call)} for call in calls[1:]]
    return [first, *rest]


def _calls(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The calls of a message, under any of the names that data sets use."""
    calls = parse_json(message.get("tool_calls")) or []
    legacy = message.get("function_call")
    if message.get("from") == "function_call":
        legacy = message.get("value")
    if legacy:
        calls = [*calls, parse_json(legacy)]
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UnusableRowError(BAD_ARGUMENTS)
    return calls


def _call_turn(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or call
    if not isinstance(function, Mapping) or not function.get("name"):
        raise UnusableRowError(BAD_ARGUMENTS)
    arguments = parse_json(function.get("arguments"))
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, Mapping):
        raise UnusableRowError(BAD_ARGUMENTS)
    wanted = {"name": str(function["name"]), "arguments": dict(arguments)}
    return {"tool_calls": [{"type": "function", "function": wanted}], "id": call.get("id")}


def _one_call_at_a_time(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put every result right after its call: a template names a result after the last call."""
    ordered: list[dict[str, Any]] = []
    place = 0
    while place < len(turns):
        count = turns[place].get("calls", 1)
        calls = turns[place : place + count]
        place += count
        if count == 1:
            ordered += calls
            continue
        end = place
        while end < len(turns) and turns[end]["role"] == "tool":
            end += 1
        ordered += _paired(calls, turns[place:end])
        place = end
    return ordered


def _paired(calls: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ids = [call.get("id") for call in calls]
    distinct = None not in ids and len(set(ids)) == len(ids)
    by_id = distinct and all(result.get("id") in ids for result in results)
    paired: list[dict[str, Any]] = []
    for place, call in enumerate(calls):
        last = place == len(calls) - 1
        if by_id:
            own = [result for result in results if result["id"] == call["id"]]
        else:
            own = results[place:] if last else results[place : place + 1]
        paired += [call, *own]
    return paired


def _check_tool_results(turns: Sequence[Mapping[str, Any]]) -> None:
    called = False
    for turn in turns:
        if turn["role"] == "assistant":
            called = "tool_calls" in turn
        elif turn["role"] == "tool" and not called:
            raise UnusableRowError(NO_CALL)
