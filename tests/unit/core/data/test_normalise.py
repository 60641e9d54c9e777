import json

import pytest

from nexus_cli.core.data import messages as m
from nexus_cli.core.data.errors import BadRowError, UnusableRowError
from nexus_cli.core.data.normalise import EMPTY_CONVERSATION, EMPTY_TEXT, normalise

USER = {"role": "user", "content": "What is the weather?"}
ANSWER = {"role": "assistant", "content": "Sunny."}


def call(name, arguments, call_id=None):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, **said):
    return {"role": "assistant", "tool_calls": list(calls), **said}


def result(content, call_id=None):
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def turns(*messages):
    return list(normalise({"messages": list(messages)}).messages)


def reason(row):
    with pytest.raises(UnusableRowError) as caught:
        normalise(row)
    return str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"conversations": [USER, ANSWER]},
        {
            "conversations": [
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": ANSWER["content"]},
            ]
        },
        {"input": [USER], "output": ANSWER["content"], "system_prompt": ""},
        {"input": USER["content"], "output": ANSWER["content"] + "<|eot_id|>"},
        {
            "input": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
            f"{USER['content']}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "output": ANSWER["content"],
        },
        {"prompt": USER["content"], "response": ANSWER["content"]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": USER["content"], "input": "", "output": ANSWER["content"]},
        {"question": USER["content"], "answer": ANSWER["content"]},
        {"messages": [{**USER, "content": [{"type": "text", "text": USER["content"]}]}, ANSWER]},
    ],
)
def test_every_layout_of_the_same_conversation_is_the_same_document(row):
    assert normalise(row).messages == (USER, ANSWER)
    assert normalise(row).id == normalise({"messages": [USER, ANSWER]}).id


def test_plain_text_is_a_document_of_text():
    document = normalise({"text": "Once upon a time.", "license": "MIT"}, source_index=3)
    assert (document.text, document.source_index) == ("Once upon a time.", 3)
    assert normalise({"content": "def f(): ..."}).text == "def f(): ..."


def test_the_context_of_an_instruction_follows_it():
    row = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
    assert normalise(row).messages[0]["content"] == "Translate.\n\nGuten Tag"


def test_a_system_prompt_beside_the_conversation_comes_first():
    row = {"input": [USER], "output": "Sunny.", "system_prompt": "Be short."}
    assert normalise(row).messages[0] == {"role": "system", "content": "Be short."}


def test_a_system_turn_of_a_llama_prompt_is_kept():
    head = "<|start_header_id|>system<|end_header_id|>\n\ndetailed thinking off<|eot_id|>"
    user = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    first, second, _ = normalise({"input": head + user, "output": "Hello"}).messages
    assert (first["role"], first["content"]) == ("system", "detailed thinking off")
    assert (second["role"], second["content"]) == ("user", "Hi")


@pytest.mark.parametrize("row", [{}, {"uuid": "1", "body": "x"}, {"text": 3}, ["text"], "text"])
def test_a_row_of_no_known_layout_is_an_error_that_names_its_keys(row):
    with pytest.raises(BadRowError) as caught:
        normalise(row)
    if isinstance(row, dict):
        assert all(key in str(caught.value) for key in row)
        assert "expected messages" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": " \n"}, EMPTY_TEXT),
        ({"text": None}, EMPTY_TEXT),
        ({"messages": []}, EMPTY_CONVERSATION),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, m.WITHHELD_PROMPT),
        ({"messages": [{"role": "user", "content": "-"}, ANSWER]}, m.WITHHELD_PROMPT),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, m.EMPTY_ANSWER),
        ({"input": [USER], "output": None}, m.EMPTY_ANSWER),
        ({"messages": [USER]}, m.NO_ANSWER),
        ({"messages": [USER, result("5"), ANSWER]}, m.NO_CALL),
        ({"messages": [{"role": "narrator", "content": "x"}, ANSWER]}, m.UNKNOWN_ROLE),
        ({"messages": [{**USER, "content": [{"type": "image"}]}, ANSWER]}, m.NOT_TEXT),
        ({"messages": [USER, calling(call("f", "{broken"))]}, m.BAD_ARGUMENTS),
        ({"messages": [USER, calling(call("f", "[1]"))]}, m.BAD_ARGUMENTS),
        ({"messages": [USER, calling(call("", "{}"))]}, m.BAD_ARGUMENTS),
    ],
)
def test_a_row_with_nothing_to_learn_from_is_left_out_with_its_reason(row, why):
    assert reason(row) == why


def test_empty_tool_calls_are_dropped():
    assert turns(USER, {**ANSWER, "tool_calls": []}) == [USER, ANSWER]
    assert turns(USER, {**ANSWER, "tool_calls": None}) == [USER, ANSWER]


def test_arguments_and_results_given_as_json_text_become_objects():
    said = turns(USER, calling(call("f", '{"x": 1}'), content=None), result('{"y": 2}'), ANSWER)
    assert said[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert said[2] == {"role": "tool", "content": {"y": 2}}


def test_a_result_that_is_no_json_stays_text():
    said = turns(USER, calling(call("f", {})), result("None"), ANSWER)
    assert said[2]["content"] == "None"
    assert turns(USER, calling(call("f", None)), result("null"), ANSWER)[2]["content"] == "null"


def test_several_calls_of_one_message_come_one_by_one_each_before_its_result():
    said = turns(
        USER,
        calling(call("f", {}, "a"), call("g", {}, "b"), content="Both."),
        result("of g", "b"),
        result("of f", "a"),
        ANSWER,
    )
    names = [turn["tool_calls"][0]["function"]["name"] for turn in said if "tool_calls" in turn]
    assert names == ["f", "g"]
    assert [turn["content"] for turn in said if turn["role"] == "tool"] == ["of f", "of g"]
    assert [turn["role"] for turn in said[1:5]] == ["assistant", "tool", "assistant", "tool"]
    assert (said[1]["thinking"], said[3].get("thinking")) == ("Both.", None)


def test_results_without_ids_belong_to_the_calls_in_order():
    said = turns(USER, calling(call("f", {}), call("g", {})), result("1"), result("2"), ANSWER)
    assert [turn["content"] for turn in said[1:5]] == ["", 1, "", 2]


def test_what_is_said_and_thought_beside_a_call_is_one_thought():
    said = turns(USER, calling(call("f", {}), content="I look.", reasoning_content="Hm."))
    assert (said[1]["thinking"], said[1]["content"]) == ("Hm.\n\nI look.", "")


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nHm.\n</think>\n\nSunny."},
        {"content": "Hm.\n</think>\n\nSunny."},
        {"content": "Sunny.", "reasoning_content": "Hm."},
        {"content": "Sunny.", "thinking": "Hm.", "reasoning_content": "Hm."},
    ],
)
def test_thinking_is_found_wherever_it_stands(answer):
    said = turns(USER, {"role": "assistant", **answer})[1]
    assert (said["thinking"], said["content"]) == ("Hm.", "Sunny.")


def test_an_empty_thought_is_none():
    assert turns(USER, {"role": "assistant", "content": "<think></think>Sunny."})[1] == ANSWER


def test_system_messages_are_merged_into_the_first():
    system = [{"role": "system", "content": text} for text in ("One.", "Two.")]
    said = turns(system[0], USER, {"role": "developer", "content": "Two."}, ANSWER)
    assert said == [{"role": "system", "content": "One.\n\nTwo."}, USER, ANSWER]
    assert turns({"role": "system", "content": None}, USER, ANSWER) == [USER, ANSWER]


def test_turns_that_nobody_answered_are_cut_off():
    assert turns(USER, ANSWER, USER) == [USER, ANSWER]


def test_older_spellings_of_a_call_are_read():
    old = {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    assert turns(USER, old)[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    shared = [
        {"from": "human", "value": "Call."},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": '{"y": 2}'},
        {"from": "gpt", "value": "Done."},
    ]
    said = normalise({"conversations": shared}).messages
    assert said[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert said[2] == {"role": "tool", "content": {"y": 2}}
