import json

import pytest

from nexus_cli.core.data.errors import UnusableRowError
from nexus_cli.core.data.tool_schema import tools_of

FUNCTION = {
    "name": "weather",
    "description": "Look it up.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Which city."}},
        "required": ["city"],
    },
}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [FUNCTION]},
        {"metadata": json.dumps({"tools": [TOOL]})},
        {"metadata": {"tools": json.dumps([FUNCTION])}},
        {"tools": [], "metadata": json.dumps({"tools": [TOOL]})},
    ],
)
def test_tools_are_found_wrapped_and_parsed_wherever_they_stand(row):
    assert tools_of(row) == (TOOL,)


@pytest.mark.parametrize("row", [{}, {"tools": None}, {"metadata": "{}"}, {"metadata": "no json"}])
def test_a_row_may_have_no_tools(row):
    assert tools_of(row) == ()


def test_properties_given_as_text_are_parsed():
    properties = FUNCTION["parameters"]["properties"]
    parameters = {**FUNCTION["parameters"], "properties": json.dumps(properties)}
    assert tools_of({"tools": [{**FUNCTION, "parameters": parameters}]}) == (TOOL,)


def test_a_tool_without_a_description_gets_an_empty_one():
    (tool,) = tools_of({"tools": [{"name": "now", "description": None}]})
    assert tool["function"]["description"] == ""


def test_a_default_beside_an_enum_becomes_text():
    properties = {"n": {"type": "integer", "enum": [1, 2], "default": 1}, "m": {"default": 5}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    (wanted,) = tools_of({"tools": [tool]})
    found = wanted["function"]["parameters"]["properties"]
    assert (found["n"]["default"], found["m"]["default"]) == ("1", 5)


@pytest.mark.parametrize("tools", [[{"description": "?"}], ["text"], {"name": "f"}, [3]])
def test_tools_of_another_shape_leave_the_row_out(tools):
    with pytest.raises(UnusableRowError):
        tools_of({"tools": tools})
