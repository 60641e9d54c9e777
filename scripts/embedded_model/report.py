"""What is said of the trained model: ``training_report.json`` and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOMAINS = {
    "general": "general",
    "code": "code",
    "math": "math",
    "trained": "the three together",
    "tool_calling": "tool calling (unseen)",
}

CARD = """# The embedded model

A real GPT-OSS, very small, for demonstrations and tests: the architecture and checkpoint format
of openai/gpt-oss (MXFP4 experts, attention sinks, sliding window, YaRN), {parameters:,}
parameters, trained from scratch on {corpus_tokens:,} tokens of text. It knows too little to be
of use as an assistant; it is here so that every stage of Nexus has something true to work on.

| | |
| --- | --- |
| layers, experts a layer, experts a token | {layers}, {experts}, 4 |
| hidden and expert width, heads, kv heads | {width}, {width}, 6 x 32, 2 |
| vocabulary | {tokenizer} tokens: the first 8,192 ranks of o200k, 21 harmony specials |
| trained | {date}, on {machine}, {minutes} minutes, {seen:,} tokens ({epochs} passes) |
| context in training | {length} tokens |
| versions | {versions} |
| experts in the forward of the last {rounded:.0%} of steps | rounded to MXFP4 (straight-through) |

## Bits a byte, on held-out text

Scored with stock transformers on the files of this folder, dequantised to bf16, in windows of
{length} tokens that share no context. In the first figure the system message, the same in every
chat, is not scored, and special tokens cost bits and count no bytes: this is the one to judge
by. The second is over all that a chat renders to, template and special tokens included.

| domain | bits a byte | rendered | bytes | tokens |
| --- | --- | --- | --- | --- |
{scores}

Held-out rows share no function, page, word-problem template, headword or passage with a row of
training, and no more than a fifth of their runs of thirteen words. On both sides a word-problem
template has at most 15 rows and a passage one. Word problems and drill questions are held out by
template and by module, so those figures are of kinds of problem never seen. **Tool calling was not
trained on at all**: it is the domain to learn. The files of `../data` called `held-out` are part
of this held-out set; `general.train` is part of the training set.

## Routing, on the same held-out text of general, code and math

Load as a multiple of the even share; the probability of the first to fourth choice is the mean
over tokens of a softmax over all experts.

| layer | least used | most used | first to fourth choice |
| --- | --- | --- | --- |
{routing}

## Data and licences

| file | rows trained on | licence |
| --- | --- | --- |
{data}

Share-alike text was left out of training. MMLU, TruthfulQA, CommonsenseQA, OpenBookQA and
NarrativeQA are in the training text: no score of this model on them means anything.
The o200k ranks are OpenAI's, under MIT; the chat template is OpenAI's, under Apache-2.0. The
weights are released under Apache-2.0 like the rest of this package. `../NOTICE` and
`../licenses` hold the notices.
"""


def write_report(facts: dict[str, Any], folder: Path) -> None:
    """Write the report as JSON and as a model card.

    Args:
        facts: what ``make.py`` gathered.
        folder: the model folder.
    """
    text = json.dumps(facts, indent=1) + "\n"
    (folder / "training_report.json").write_text(text, encoding="utf-8")
    tables = {
        "scores": _scores(facts["bits_per_byte"]),
        "routing": _routing(facts["routing"]),
        "data": _data(facts["data"]),
    }
    (folder / "README.md").write_text(CARD.format(**facts["card"], **tables), encoding="utf-8")


def _scores(scores: dict[str, Any]) -> str:
    lines = []
    for name, title in DOMAINS.items():
        row = scores[name]
        lines.append(
            f"| {title} | {row['bits_per_byte']:.3f} | {row['rendered_bits_per_byte']:.3f} "
            f"| {row['bytes']:,} | {row['tokens']:,} |"
        )
    return "\n".join(lines)


def _routing(layers: list[dict[str, Any]]) -> str:
    lines = []
    for number, layer in enumerate(layers):
        choices = ", ".join(f"{value:.2f}" for value in layer["top_k_probability"])
        lines.append(
            f"| {number} | {layer['load_min']:.2f} | {layer['load_max']:.2f} | {choices} |"
        )
    return "\n".join(lines)


def _data(data: dict[str, Any]) -> str:
    return "\n".join(
        f"| {name} | {row['rows']:,} | {row['license']} |" for name, row in sorted(data.items())
    )
