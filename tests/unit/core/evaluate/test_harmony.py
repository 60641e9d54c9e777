"""A harmony answer is read mark by mark."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nexus_cli.core.evaluate.harmony import HarmonyReader, Piece

MARKS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"]
NUMBERS = {mark: 1000 + n for n, mark in enumerate(MARKS)}


def decode(ids: Sequence[int]) -> str:
    """Tokens are bytes here, as in a byte-level vocabulary."""
    return bytes(ids).decode("utf-8", errors="replace")


def reader() -> HarmonyReader:
    return HarmonyReader({number: mark for mark, number in NUMBERS.items()}, decode)


def tokens(text: str) -> list[int]:
    for mark, number in NUMBERS.items():
        text = text.replace(mark, chr(0xE000 + number))
    return [
        ord(c) - 0xE000 if 0xE000 <= ord(c) < 0xF8FF else byte
        for c in text
        for byte in ([0] if 0xE000 <= ord(c) < 0xF8FF else c.encode())
    ]


def said(text: str) -> list[tuple[str, str]]:
    """Text by channel, neighbouring pieces joined."""
    found, joined = reader(), []
    pieces = [piece for token in tokens(text) for piece in found.read(token)] + found.finish()
    for piece in pieces:
        if joined and joined[-1][0] == piece.channel:
            joined[-1] = (piece.channel, joined[-1][1] + piece.text)
        else:
            joined.append((piece.channel, piece.text))
    return joined


def test_channels_are_told_apart() -> None:
    answer = (
        "<|channel|>analysis<|message|>Think.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hi!<|return|>"
    )
    assert said(answer) == [("analysis", "Think."), ("final", "Hi!")]


def test_a_tool_call_is_commentary_and_its_recipient_is_no_text() -> None:
    answer = ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
    assert said(answer) == [("commentary", '{"a": 1}')]


def test_a_character_of_several_tokens_comes_whole() -> None:
    found = reader()
    for token in tokens("<|channel|>final<|message|>"):
        assert found.read(token) == []
    euro = list("€".encode())
    assert [found.read(token) for token in euro] == [[], [], [Piece("final", "€")]]


def test_words_without_marks_are_raw_and_still_stream() -> None:
    assert said("hello") == [("raw", "hello")]
    found = reader()
    pieces = [piece for token in b"x" * 100 for piece in found.read(token)]
    assert "".join(piece.text for piece in pieces) == "x" * 100


def test_bytes_that_are_no_text_are_not_held_back_for_ever() -> None:
    found = reader()
    for token in tokens("<|channel|>final<|message|>"):
        found.read(token)
    assert any(found.read(0xFF) for _ in range(20))


class PlainTokenizer:
    def __init__(self) -> None:
        self.added_tokens_decoder: dict[int, object] = {}

    def decode(self, ids: Sequence[int]) -> str:
        return decode(ids)


@pytest.mark.parametrize("text", ["plain"])
def test_a_tokenizer_without_harmony_gives_its_text_as_it_comes(text: str) -> None:
    found = HarmonyReader.for_tokenizer(PlainTokenizer())
    assert [found.read(token) for token in text.encode()] == [[Piece("final", c)] for c in text]
