"""Tool definitions in the one form that chat templates render: wrapped, parsed and complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nexus_cli.core.data.errors import UnusableRowError
from nexus_cli.core.data.messages import parse_json

BAD_TOOLS = "tool definitions that are not objects with a name"


def tools_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The tools of a row: its ``tools``, or those in its ``metadata``, JSON strings or not.

    Raises:
        UnusableRowError: there are tools, and one is no object with a name.
    """
    raw = parse_json(row.get("tools"))
    if not raw:
        metadata = parse_json(row.get("metadata"))
        raw = parse_json(metadata.get("tools")) if isinstance(metadata, Mapping) else None
    if not raw:
        return ()
    if not isinstance(raw, list):
        raise UnusableRowError(BAD_TOOLS)
    return tuple(_wrapped(parse_json(tool)) for tool in raw)


def _wrapped(tool: Any) -> dict[str, Any]:
    function = parse_json(tool.get("function", tool)) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not function.get("name"):
        raise UnusableRowError(BAD_TOOLS)
    wanted = {key: value for key, value in function.items() if key != "parameters"}
    wanted["description"] = str(function.get("description") or "")
    parameters = parse_json(function.get("parameters"))
    if isinstance(parameters, Mapping):
        wanted["parameters"] = _schema(parameters)
    return {"type": "function", "function": wanted}


def _schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    schema = dict(parameters)
    properties = parse_json(schema.get("properties"))
    schema["properties"] = (
        {str(name): _property(parse_json(value)) for name, value in properties.items()}
        if isinstance(properties, Mapping)
        else {}
    )
    if not isinstance(schema.get("required"), list):
        schema["required"] = []
    return schema


def _property(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {"type": value} if isinstance(value, str) else {}
    wanted = dict(value)
    if "properties" in wanted:
        wanted |= _schema(wanted)
    if wanted.get("description") is not None:
        wanted["description"] = str(wanted["description"])
    # Beside an enum or a oneOf the template adds the default to a string.
    choice = wanted.get("enum") or wanted.get("oneOf")
    if choice and "default" in wanted and not isinstance(wanted["default"], str):
        wanted["default"] = str(wanted["default"])
    return wanted
