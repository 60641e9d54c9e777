import json

import pytest

from nexus_cli.core.data.document import Document, is_held_out

CHAT = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def test_the_id_is_of_the_content_alone():
    assert Document(text="a").id == Document(text="a", source_index=4).id
    assert Document(text="a").id != Document(text="b").id
    assert Document(messages=CHAT).id == Document(messages=tuple(map(dict, CHAT))).id
    assert Document(messages=CHAT).id != Document(messages=CHAT, tools=({"type": "x"},)).id


def test_the_id_does_not_depend_on_the_order_of_keys():
    turned = tuple(dict(reversed(message.items())) for message in CHAT)
    assert Document(messages=turned).id == Document(messages=CHAT).id


def test_broken_unicode_has_an_id():
    assert Document(text=json.loads('"\\ud800"')).id


def test_a_document_is_text_or_messages():
    for fields in ({}, {"text": "a", "messages": CHAT}):
        with pytest.raises(ValueError, match="either"):
            Document(**fields)


def test_words_are_what_somebody_wrote():
    call = {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": []}
    assert Document(messages=(*CHAT, call)).words == "a\nb\nhm"
    assert Document(text="x").words == "x"


def test_a_larger_share_holds_out_more_and_the_same():
    ids = [Document(text=str(number)).id for number in range(2000)]
    small, large = ({i for i in ids if is_held_out(i, share)} for share in (0.1, 0.3))
    assert small < large
    assert 140 < len(small) < 260
    assert not any(is_held_out(i, 0.0) for i in ids)
    assert all(is_held_out(i, 1.0) for i in ids)
