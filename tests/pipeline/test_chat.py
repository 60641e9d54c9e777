"""``nexus validate --chat`` through pipes, and its commands."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.evaluate.generate import Sampling, generate
from nexus_cli.core.evaluate.perplexity import Subject
from nexus_cli.core.model.gpt_oss.loading import load_model, load_tokenizer
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import chat, validate
from nexus_cli.pipeline.validate import Mode


def converse(
    model: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    **settings: object,
) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    config = ValidateConfig.model_validate(
        {"checkpoint": str(model), "dtype": "float32", "runtime": {"device": "cpu"}, **settings}
    )
    validate.run(config, Workspace(tmp_path), mode=Mode(check=False, chat=True))
    assert not list(tmp_path.iterdir())
    return capsys.readouterr().out


def test_greedy_answers_are_those_of_transformers_generate(tiny_converted_dir: Path) -> None:
    model = load_model(tiny_converted_dir, device="cpu", dtype=torch.float32)
    prompt = torch.randint(1000, (40,), generator=torch.Generator().manual_seed(1))
    ours = list(
        generate(Subject(model), prompt, {199_999}, Sampling(0.0, max_tokens=25), torch.Generator())
    )
    theirs = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=25,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ours == theirs[0, 40:].tolist()


def test_a_stop_token_ends_the_answer(tiny_converted_dir: Path) -> None:
    model = load_model(tiny_converted_dir, device="cpu", dtype=torch.float32)
    prompt = torch.arange(10)
    first, second = list(
        generate(Subject(model), prompt, set(), Sampling(0.0, max_tokens=2), torch.Generator())
    )
    assert first != second
    stopped = list(generate(Subject(model), prompt, {second}, Sampling(0.0), torch.Generator()))
    assert stopped == [first, second]


def test_questions_and_commands_come_through_a_pipe(
    tiny_converted_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    lines = "/max 3\n/temp 0\nhi\n\n/system Be brief.\n/temp x\n/help\n/clear\nhi\n/quit\nnever\n"
    printed = converse(tiny_converted_dir, lines, monkeypatch, capsys, tmp_path)
    assert "at most 3 tokens" in printed
    assert "temperature 0" in printed
    assert "system message: Be brief." in printed
    assert "/temp x: not understood" in printed
    assert "the conversation is forgotten" in printed


def test_the_end_of_the_input_ends_the_chat_and_the_baseline_answers_too(
    tiny_converted_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    printed = converse(
        tiny_converted_dir,
        "/max 4\n/temp 0\nhi\n",
        monkeypatch,
        capsys,
        tmp_path,
        baseline="self",
    )
    model, baseline = printed.split("[model]\n")[1].split("[baseline]\n")
    assert model == baseline  # the gate is closed, and the choice greedy


def make_chat(tiny: Path, **speaker: object) -> chat.Chat:
    model = load_model(tiny, device="cpu", dtype=torch.float32)
    return chat.Chat(
        speakers=[chat.Speaker("model", Subject(model), **speaker)],
        tokenizer=load_tokenizer(tiny),
        stop=frozenset(),
        sampling=Sampling(0.0, max_tokens=3),
        generator=torch.Generator(),
        terminal=chat.Terminal(),
    )


def test_each_turn_is_remembered_once_with_the_system_message_in_front(
    tiny_converted_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_chat(tiny_converted_dir)
    seen: list[list[dict]] = []
    render = state.tokenizer.apply_chat_template

    def spy(messages: list[dict], **options: object) -> str:
        seen.append([dict(message) for message in messages])
        return render(messages, **options)

    monkeypatch.setattr(state.tokenizer, "apply_chat_template", spy)
    chat.command(state, "/system Short answers.")
    chat._answer(state, "one")
    chat._answer(state, "two")
    assert [m["role"] for m in seen[1]] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in seen[1] if m["role"] == "user"] == ["one", "two"]
    assert "User:" not in render(seen[1], tokenize=False)


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    tiny_converted_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = make_chat(tiny_converted_dir)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(chat, "_pieces", interrupted)
    chat._answer(state, "hello")
    assert "(stopped)" in capsys.readouterr().out
    assert [m["role"] for m in state.speakers[0].messages] == ["user", "assistant"]
