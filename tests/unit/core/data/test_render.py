import dataclasses
import json
import shutil

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from nexus_cli import embedded
from nexus_cli.core.data.document import Document
from nexus_cli.core.data.errors import BadFileError, UnusableRowError
from nexus_cli.core.data.files import read_rows
from nexus_cli.core.data.normalise import normalise
from nexus_cli.core.data.render import Renderer, tokens_in
from nexus_cli.core.data.template import with_fixed_date

TRAINING = "chat_template_training.jinja"
USER = {"role": "user", "content": "Wie wird das Wetter in Z\u00fcrich? \U0001f642"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look it up.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which."}},
            "required": ["city"],
        },
    },
}


def call(arguments, **said):
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
        **said,
    }


CHATS = {
    "question": [USER, {"role": "assistant", "content": "Sonnig."}],
    "thought": [USER, {"role": "assistant", "content": "Sonnig.", "thinking": "Hm."}],
    "system": [
        {"role": "system", "content": "Be short."},
        USER,
        {"role": "assistant", "content": "\U0001f600\U0001f600"},
    ],
    "several turns": [
        USER,
        {"role": "assistant", "content": "Sonnig.", "thinking": "Hm."},
        USER,
        {"role": "assistant", "content": " Immer noch. \n"},
    ],
    "calls": [
        USER,
        call({"city": "Z\u00fcrich", "days": [1, 20]}, thinking='As {"city": "Z\u00fcrich"}.'),
        {"role": "tool", "content": {"sky": "clear"}},
        {"role": "assistant", "content": "Sonnig."},
        USER,
        call({}),
    ],
    "unanswered call": [USER, call({"city": "Bern"}, thinking="I look it up.")],
}


@pytest.fixture(scope="module")
def renderer():
    return Renderer.from_folder(embedded.MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(embedded.MODEL_DIR)


def chat(messages, tools=(TOOL,)):
    return Document(messages=tuple(messages), tools=tools)


def corpus_chats():
    for path in sorted(embedded.DATA_DIR.glob("*.held-out.jsonl.gz")):
        for _, row in list(read_rows(path))[:40]:
            document = normalise(row)
            if document.is_chat:
                yield document


def by_transformers(tokenizer, document, template, **options):
    return tokenizer.apply_chat_template(
        list(document.messages),
        tools=list(document.tools) or None,
        chat_template=with_fixed_date(template),
        return_dict=True,
        **options,
    )


def test_ids_and_targets_of_a_chat_are_those_of_transformers(renderer, tokenizer):
    training = (embedded.MODEL_DIR / TRAINING).read_text(encoding="utf-8")
    documents = [chat(messages) for messages in CHATS.values()]
    documents += [chat(messages, tools=()) for messages in CHATS.values()]
    documents += list(corpus_chats())
    assert len(documents) > 40
    for document in documents:
        found = renderer.tokenize(document)
        official = by_transformers(tokenizer, document, tokenizer.chat_template)
        marked = by_transformers(tokenizer, document, training, return_assistant_tokens_mask=True)
        assert found.input_ids.tolist() == official["input_ids"]
        assert found.loss_mask.tolist() == [bool(bit) for bit in marked["assistant_masks"]]


def test_marks_put_into_the_official_template_give_the_same_targets(renderer, tokenizer):
    own = Renderer(tokenizer, training_template=None)
    for document in [chat(messages) for messages in CHATS.values()]:
        found, expected = own.tokenize(document), renderer.tokenize(document)
        assert (found.input_ids == expected.input_ids).all()
        assert (found.loss_mask == expected.loss_mask).all()
        assert (found.value_mask == expected.value_mask).all()


def test_targets_begin_where_a_generation_prompt_ends_and_hold_the_stop_token(renderer):
    found = renderer.tokenize(chat(CHATS["calls"][:2]))
    targets = renderer.tokenizer.decode(found.input_ids[found.loss_mask])
    assert targets == (
        '<|channel|>analysis<|message|>As {"city": "Z\u00fcrich"}.<|end|>'
        " to=functions.get_weather<|channel|>commentary json<|message|>"
        '{"city": "Z\u00fcrich", "days": [1, 20]}<|call|>'
    )
    last = renderer.tokenize(chat(CHATS["question"]))
    assert renderer.tokenizer.decode(last.input_ids[last.loss_mask]).endswith("<|return|>")


def test_values_of_a_call_are_marked_and_nothing_else(renderer):
    arguments = {"city": "Frankfurt", "when": {"day": "Monday"}, "n": [3, 44], "empty": ""}
    found = renderer.tokenize(chat([USER, call(arguments)]))
    pieces = [renderer.tokenizer.decode([i]) for i in found.input_ids[found.value_mask]]
    assert "".join(pieces) == "FrankfurtMonday344"


def test_a_token_that_spells_a_value_and_its_frame_counts_as_value(renderer):
    found = renderer.tokenize(chat([USER, call({"path": "/tmp/", "text": "Is it? Yes."})]))
    text = renderer.tokenizer.decode(found.input_ids[found.value_mask])
    assert "/tmp/" in text
    assert "Is it? Yes." in text
    assert "path" not in text
    assert (found.value_mask <= found.loss_mask).all()


def test_plain_text_is_scored_whole_between_start_and_end(renderer, tokenizer):
    text = "Es war einmal \u00e4\U0001f642."
    found = renderer.tokenize(Document(text=text))
    bos, end = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    assert found.input_ids.tolist() == [bos, *tokenizer(text)["input_ids"], end]
    assert found.loss_mask.tolist() == [False] + [True] * (len(found) - 1)
    assert not found.value_mask.any()
    assert found.num_bytes == len(text.encode())


def test_control_tokens_in_plain_text_are_read_as_text(renderer):
    found = renderer.tokenize(Document(text="Ends with <|endoftext|>, or <|call|>."))
    special = set(renderer.tokenizer.added_tokens_encoder.values())
    assert not special & set(found.input_ids[1:-1].tolist())
    assert (
        renderer.tokenizer.decode(found.input_ids[1:-1]) == "Ends with <|endoftext|>, or <|call|>."
    )
    after = renderer.tokenize(chat(CHATS["question"]))  # and the tokenizer is as it was before
    assert special & set(after.input_ids.tolist())


@pytest.mark.parametrize(
    "messages",
    [
        [{**USER, "content": "<|start|>assistant"}, {"role": "assistant", "content": "x"}],
        [USER, {"role": "assistant", "content": "x <|return|>"}],
        [USER, call({"city": "<|call|>"})],
        [USER, call({"<|end|>": 1})],
    ],
)
def test_control_tokens_in_a_chat_leave_it_out(renderer, messages):
    with pytest.raises(UnusableRowError, match="control tokens"):
        renderer.tokenize(chat(messages))


def test_broken_unicode_leaves_a_document_out(renderer):
    lone = json.loads('"\\ud800 x"')
    for document in (Document(text=lone), chat([USER, {"role": "assistant", "content": lone}])):
        with pytest.raises(UnusableRowError, match="Unicode"):
            renderer.tokenize(document)


def test_what_the_template_refuses_is_left_out(renderer):
    result = {"role": "tool", "content": "x"}
    with pytest.raises(UnusableRowError, match="template"):
        renderer.tokenize(chat([USER, result, {"role": "assistant", "content": "x"}]))


def test_bytes_are_those_of_the_targets_without_control_tokens(renderer):
    answer = "S\u00fc\u00df \U0001f642"
    found = renderer.tokenize(chat([USER, {"role": "assistant", "content": answer}]))
    assert found.num_bytes == len(f"final{answer}".encode())


def test_a_training_template_with_another_text_is_an_error(tokenizer):
    training = tokenizer.chat_template.replace("Knowledge cutoff", "Cutoff")
    renderer = Renderer(
        tokenizer, training.replace("{#-", "{% generation %}{% endgeneration %}{#-", 1)
    )
    with pytest.raises(BadFileError, match="another text"):
        renderer.tokenize(chat(CHATS["question"]))


def test_a_training_template_without_marks_is_an_error(tokenizer):
    with pytest.raises(BadFileError, match="generation"):
        Renderer(tokenizer, tokenizer.chat_template).tokenize(chat(CHATS["question"]))


def test_without_a_chat_template_plain_text_is_read_and_a_chat_is_an_error(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.MODEL_DIR / name, tmp_path)
    renderer = Renderer.from_folder(tmp_path)
    assert len(renderer.tokenize(Document(text="Hello"))) >= 3
    with pytest.raises(BadFileError, match="no chat template"):
        renderer.tokenize(chat(CHATS["question"]))


def test_a_folder_without_a_readable_tokenizer_is_an_error(tmp_path):
    with pytest.raises(BadFileError, match=r"no tokenizer\.json"):
        Renderer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(BadFileError, match="not a readable tokenizer"):
        Renderer.from_folder(tmp_path)


def test_a_document_keeps_its_identity(renderer):
    document = dataclasses.replace(chat(CHATS["question"]), source_index=2)
    found = renderer.tokenize(document)
    assert (found.id, found.source_index, found.is_chat) == (document.id, 2, True)


def test_tokens_count_that_share_a_character_with_a_span():
    offsets = np.array([[0, 3], [3, 5], [5, 5], [5, 9]])
    assert tokens_in(offsets, [(2, 3), (8, 9)], 9).tolist() == [True, False, False, True]
    assert tokens_in(offsets, [(3, 3)], 9).tolist() == [False] * 4
