"""The embedded model is a real GPT-OSS checkpoint, and its corpus keeps its promises."""

from __future__ import annotations

import gzip
import json
import re
from itertools import combinations
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerBase,
)

from nexus_cli.embedded import DATA_DIR, MODEL_DIR

BUNDLED = ("general.train", "general.held-out", "tool-calling.train", "tool-calling.held-out")
PERMISSIVE = {
    *("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT", "MIT OR Apache-2.0", "PostgreSQL"),
    *("MIT (public-domain novels)", "PDDL-1.0 / CC0-1.0", "PSF-2.0", "WordNet-3.0"),
    "public domain",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def bundle() -> dict[str, list[dict[str, Any]]]:
    return {name: read_rows(name) for name in BUNDLED}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((MODEL_DIR / "config.json").read_text())


def read_rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA_DIR / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def content(row: dict[str, Any]) -> str:
    if "text" in row:
        return row["text"]
    calls = [call for message in row["messages"] for call in message.get("tool_calls") or []]
    said = [message.get("content") or "" for message in row["messages"]]
    return "\n".join(said + [call["function"]["arguments"] for call in calls])


def functions(row: dict[str, Any]) -> set[str]:
    calls = [call for message in row["messages"] for call in message.get("tool_calls") or []]
    return {tool["function"]["name"] for tool in row["tools"]} | {
        call["function"]["name"] for call in calls
    }


def word_runs(row: dict[str, Any], length: int = 13) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", content(row).lower())
    return {tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}


def test_stock_transformers_loads_it_and_predicts_text_better_than_chance() -> None:
    model, info = AutoModelForCausalLM.from_pretrained(MODEL_DIR, output_loading_info=True)
    assert type(model) is GptOssForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text = "The United States of America is a nation of laws, and the Congress of the people."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    assert torch.isfinite(output.logits).all()
    assert output.loss < 5.0  # a uniform guess costs log(8256) = 9.0


def test_the_layout_is_the_one_of_openais_checkpoints(config: dict[str, Any]) -> None:
    index = json.loads((MODEL_DIR / "model.safetensors.index.json").read_text())
    stored: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(MODEL_DIR.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                part = tensors.get_slice(name)
                stored[name] = (part.get_dtype(), part.get_shape())
                assert index["weight_map"][name] == file.name
    assert stored == expected_layout(config)
    assert len(set(index["weight_map"].values())) >= 2


def expected_layout(config: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    dense = GptOssConfig.from_dict({k: v for k, v in config.items() if k != "quantization_config"})
    with torch.device("meta"):
        model = GptOssForCausalLM(dense)
    layout: dict[str, tuple[str, list[int]]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width_in, width_out = parameter.shape
            packed = [experts, width_out, width_in // 32]
            layout[f"{name}_blocks"] = ("U8", [*packed, 16])
            layout[f"{name}_scales"] = ("U8", packed)
        else:
            layout[name] = ("BF16", list(parameter.shape))
    return layout


def test_the_configuration_has_the_real_models_fields(config: dict[str, Any]) -> None:
    assert config["model_type"] == "gpt_oss"
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert config["router_aux_loss_coef"] == 0.9
    assert config["layer_types"][:2] == ["sliding_attention", "full_attention"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (32, 4)
    assert config["rope_scaling"]["rope_type"] == "yarn"
    assert config["tie_word_embeddings"] is False


def test_the_folder_is_at_most_16_mb_and_the_corpus_at_most_2() -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) <= 16_000_000
    assert sum(file.stat().st_size for file in DATA_DIR.iterdir()) <= 2_000_000


def test_special_ids_agree_everywhere(
    tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]
) -> None:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.get_added_vocab()}
    assert sorted(ids.values()) == list(range(8192, 8213))
    assert ids["<|startoftext|>"] == tokenizer.bos_token_id == 8192
    assert ids["<|return|>"] == tokenizer.eos_token_id == config["eos_token_id"]
    assert ids["<|endoftext|>"] == tokenizer.pad_token_id == config["pad_token_id"]
    generation = GenerationConfig.from_pretrained(MODEL_DIR)
    stops = [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]]
    assert generation.eos_token_id == stops
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) <= config["vocab_size"]


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "na\u00efve \u0e0a\u0e48 \U0001f600\n\n\tdef f(x): return 12345 * x  "
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 8192


def test_the_training_template_renders_the_same_and_marks_what_the_assistant_writes(
    tokenizer: PreTrainedTokenizerBase, bundle: dict[str, list[dict[str, Any]]]
) -> None:
    marked = (MODEL_DIR / "chat_template_training.jinja").read_text(encoding="utf-8")
    chats = [row["messages"] for row in bundle["general.train"] if "messages" in row][:20]
    for messages in chats:
        plain = tokenizer.apply_chat_template(messages, tokenize=False)
        assert plain == tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=marked
        )
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        learnt = tokenizer.decode([token for token, mask in pairs if mask])
        assert learnt == f"<|channel|>final<|message|>{messages[-1]['content']}<|return|>"


def test_every_row_is_permissive_and_says_where_it_came_from(
    bundle: dict[str, list[dict[str, Any]]],
) -> None:
    for rows in bundle.values():
        assert {row["license"] for row in rows} <= PERMISSIVE
        assert all(row["source"] and row["category"] for row in rows)
        assert all(("text" in row) != ("messages" in row) for row in rows)


def test_no_row_is_in_two_files_and_no_function_on_both_sides(
    bundle: dict[str, list[dict[str, Any]]],
) -> None:
    for one, other in combinations(BUNDLED, 2):
        assert not {row["uuid"] for row in bundle[one]} & {row["uuid"] for row in bundle[other]}
    sides = [
        set().union(*map(functions, bundle[f"tool-calling.{side}"]))
        for side in ("train", "held-out")
    ]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("name", ["general", "tool-calling"])
def test_held_out_rows_are_no_near_duplicates_of_training_rows(
    bundle: dict[str, list[dict[str, Any]]], name: str
) -> None:
    seen = set().union(*map(word_runs, bundle[f"{name}.train"]))
    for row in bundle[f"{name}.held-out"]:
        runs = word_runs(row)
        assert len(runs & seen) <= 0.2 * len(runs)
