import json

from nexus_cli.core.data.call_values import argument_value_spans, value_spans


def spelled(arguments):
    text, spans = value_spans(arguments)
    assert text == json.dumps(arguments, ensure_ascii=False)
    return [text[start:end] for start, end in spans]


def test_values_are_what_is_neither_key_nor_frame():
    arguments = {
        "city": 'Z\u00fcrich "x"',
        "days": [1, 2.5, {"unit": "C", "n": None}],
        "empty": "",
        "deep": {"a": {"b": True}},
        "none": {},
    }
    assert spelled(arguments) == ['Z\u00fcrich \\"x\\"', "1", "2.5", "C", "null", "true"]


def test_odd_keys_are_written_as_json_writes_them():
    assert spelled({2: "a", True: "b", 'q"': "c"}) == ["a", "b", "c"]


def call(name, arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"function": function}]}


def test_a_thought_that_quotes_the_call_is_not_taken_for_it():
    arguments = {"x": "one"}
    quoted = json.dumps(arguments)
    thought, called = f"call f with {quoted}", f" to=f {quoted}<end>"
    rendered = f"user asks f {quoted}. {thought} {called} and {called}"
    first = rendered.index(thought)
    second, third = rendered.index(called), rendered.rindex(called)
    spans = [
        (first, first + len(thought)),
        (second, second + len(called)),
        (third, third + len(called)),
    ]
    found = argument_value_spans(rendered, spans, [call("f", arguments), call("f", arguments)])
    assert [rendered[start:end] for start, end in found] == ["one", "one"]
    assert second < found[0][0] < third < found[1][0]


def test_calls_that_the_template_left_out_have_no_values():
    assert argument_value_spans("nothing here", [(0, 12)], [call("f", {"x": 1})]) == []
