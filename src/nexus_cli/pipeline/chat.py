"""``nexus validate --chat``: talk to the model, alone or beside its baseline."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.distributed import World
from nexus_cli.core.evaluate.generate import Sampling, generate
from nexus_cli.core.evaluate.harmony import FINAL, RAW, HarmonyReader, Piece
from nexus_cli.core.evaluate.perplexity import Subject
from nexus_cli.core.model.gpt_oss.loading import load_model, load_tokenizer
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.io.terminal import Styled, Terminal
from nexus_cli.pipeline.validate_models import Choice, changes

HELP = """/system TEXT   set the system message (without TEXT: remove it); starts anew
/temp NUMBER   temperature; 0 takes the most likely token
/max NUMBER    tokens of an answer at most
/clear         forget the conversation
/quit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Speaker:
    """One side of the conversation, with its own memory of it."""

    name: str
    subject: Subject
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Chat:
    """The state of a conversation."""

    speakers: list[Speaker]
    tokenizer: Any
    stop: frozenset[int]
    sampling: Sampling
    generator: torch.Generator
    terminal: Terminal
    system: str = ""

    def forget(self) -> None:
        """Start anew; the system message stays."""
        for speaker in self.speakers:
            speaker.messages.clear()


def run(choice: Choice, *, compare: bool, config: ValidateConfig, world: World) -> None:
    """Ask and answer until the user leaves.

    Args:
        choice: The models.
        compare: Answer with the baseline too.
        config: Settings; ``seed`` seeds the sampling.
        world: One rank, and its device.
    """
    dtype = frozen_dtype(config.dtype, world.device)
    load = partial(
        load_model,
        device=world.device,
        dtype=dtype,
        experts_backend=config.runtime.experts_backend,
    )
    model = load(choice.model.path)
    speakers = [Speaker("model", Subject(model))]
    if compare:
        speakers.append(Speaker("baseline", _baseline(choice, model, load)))
    settings = model.generation_config
    stop = settings.eos_token_id
    chat = Chat(
        speakers=speakers,
        tokenizer=load_tokenizer(choice.model.path),
        stop=frozenset(stop if isinstance(stop, list) else [stop]),
        sampling=_sampling(settings),
        generator=torch.Generator().manual_seed(config.seed),
        terminal=Terminal(),
    )
    chat.terminal.say(f"{choice.model.path}; /help lists the commands", aside=True)
    while (line := _ask(chat)) is not None:
        text = line.strip()
        if text in ("/quit", "/exit"):
            break
        if text.startswith("/"):
            command(chat, text)
        elif text:
            _answer(chat, text)


def _baseline(choice: Choice, model: Any, load: Callable[[Path], Any]) -> Subject:
    """The model with its shared experts off, where that is the baseline; else the folder's."""
    if choice.baseline is not None:
        found = changes(choice) if choice.baseline == choice.base else None
        if found is None or found.frozen or found.routers:
            return Subject(load(choice.baseline.path))
    return Subject(model, shared_experts=False)


def _sampling(settings: Any) -> Sampling:
    """The model's own defaults."""
    if not settings.do_sample:
        return Sampling(temperature=0.0)
    temperature = 1.0 if settings.temperature is None else settings.temperature
    top_p = 1.0 if settings.top_p is None else settings.top_p
    return Sampling(temperature=temperature, top_p=top_p)


def _ask(chat: Chat) -> str | None:
    while True:
        try:
            return chat.terminal.ask("> ")
        except KeyboardInterrupt:
            chat.terminal.say("\n/quit or Ctrl-D leaves", aside=True)


def command(chat: Chat, line: str) -> None:
    """Carry out a ``/command``, or say what is wrong with it."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/clear":
        chat.forget()
        chat.terminal.say("the conversation is forgotten", aside=True)
    elif name == "/system":
        chat.system = value
        chat.forget()
        chat.terminal.say(f"system message: {value or 'none'}", aside=True)
    elif name == "/help":
        chat.terminal.say(HELP, aside=True)
    elif name == "/temp" and (number := _number(value)) is not None:
        chat.sampling = replace(chat.sampling, temperature=number)
        chat.terminal.say(f"temperature {number:g}", aside=True)
    elif name == "/max" and value.isdigit() and int(value) > 0:
        chat.sampling = replace(chat.sampling, max_tokens=int(value))
        chat.terminal.say(f"at most {value} tokens an answer", aside=True)
    else:
        chat.terminal.say(f"{line}: not understood\n{HELP}", aside=True)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _answer(chat: Chat, question: str) -> None:
    """Let every speaker answer; Ctrl-C keeps what was said so far."""
    answers = []
    for speaker in chat.speakers:
        speaker.messages.append({"role": "user", "content": question})
        answers.append(_speak(chat, speaker))
    try:
        if len(answers) > 1 and chat.terminal.wide:
            chat.terminal.side_by_side([s.name for s in chat.speakers], answers)
        else:
            for speaker, answer in zip(chat.speakers, answers, strict=True):
                if len(answers) > 1:
                    chat.terminal.say(f"[{speaker.name}]", aside=True)
                chat.terminal.stream(answer)
    except KeyboardInterrupt:
        chat.terminal.say("(stopped)", aside=True)
    for answer in answers:
        answer.close()
    for speaker in chat.speakers:
        if speaker.messages[-1]["role"] == "user":  # stopped before its first word
            speaker.messages.append({"role": "assistant", "content": ""})


def _speak(chat: Chat, speaker: Speaker) -> Generator[Styled, None, None]:
    """The answer of one speaker, piece by piece; it remembers the final channel alone."""
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    rendered = chat.tokenizer.apply_chat_template(
        [*system, *speaker.messages], tokenize=False, add_generation_prompt=True
    )
    ids = chat.tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids[0]
    device = speaker.subject.head.device
    said: list[str] = []
    channel = FINAL
    try:
        for piece in _pieces(chat, speaker.subject, ids.to(device)):
            if piece.channel in (FINAL, RAW):
                said.append(piece.text)
            line_break = "\n" if channel != piece.channel and channel != FINAL else ""
            channel = piece.channel
            yield line_break + piece.text, piece.channel not in (FINAL, RAW)
    finally:
        speaker.messages.append({"role": "assistant", "content": "".join(said)})


def _pieces(chat: Chat, subject: Subject, prompt_S: torch.Tensor) -> Iterator[Piece]:
    reader = HarmonyReader.for_tokenizer(chat.tokenizer)
    for token in generate(subject, prompt_S, chat.stop, chat.sampling, chat.generator):
        yield from reader.read(token)
    yield from reader.finish()
