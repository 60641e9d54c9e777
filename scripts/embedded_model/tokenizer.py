"""The tokenizer: the first merges of o200k, the 21 harmony specials, the real template."""

from __future__ import annotations

import base64
import json
import lzma
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from training_template import mark_generation
from transformers import PreTrainedTokenizerFast

NUM_MERGES = 8192
FIRST_REAL_SPECIAL = 199998
NUM_SPECIALS = 21
NAMED_SPECIALS = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def special_tokens() -> list[str]:
    """The 21 harmony specials, in the order and by the names of the real tokenizer."""
    ids = range(FIRST_REAL_SPECIAL, FIRST_REAL_SPECIAL + NUM_SPECIALS)
    return [NAMED_SPECIALS.get(i, f"<|reserved_{i}|>") for i in ids]


def build_tokenizer(files: Path, output: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer into a folder and load it back.

    Args:
        files: folder with ``o200k_base.tiktoken`` (or ``.xz``) and ``chat_template.jinja``.
        output: the model folder.
    """
    template = (files / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_pair_encoder(_read_ranks(files)),
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )
    tokenizer.save_pretrained(output)
    _rewrite_json(output / "tokenizer.json", {})
    _rewrite_json(output / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    training = output / "chat_template_training.jinja"
    training.write_text(mark_generation(template), encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(output)


def write_generation_config(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write ``generation_config.json`` with the three ids at which generation stops."""
    stops = ["<|return|>", "<|endoftext|>", "<|call|>"]
    config = {
        "bos_token_id": tokenizer.bos_token_id,
        "do_sample": True,
        "eos_token_id": [tokenizer.convert_tokens_to_ids(token) for token in stops],
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = json.dumps(config, indent=2) + "\n"
    (output / "generation_config.json").write_text(text, encoding="utf-8")


def _rewrite_json(path: Path, changes: dict[str, str]) -> None:
    """Store a JSON file on one line (the merges take a third of the room) with some changes."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


def _read_ranks(files: Path) -> list[bytes]:
    plain, packed = files / "o200k_base.tiktoken", files / "o200k_base.tiktoken.xz"
    data = plain.read_bytes() if plain.exists() else lzma.decompress(packed.read_bytes())
    lines = data.splitlines()[:NUM_MERGES]
    return [base64.b64decode(line.split()[0]) for line in lines]


def _byte_pair_encoder(ranks: list[bytes]) -> Tokenizer:
    """A BPE whose merges are every split of a token into two earlier tokens, in rank order."""
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in ranks:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(rank_of[a], rank_of[b]) for a, b in splits if a in rank_of and b in rank_of]
        merges += [(spell(ranks[a]), spell(ranks[b])) for a, b in sorted(known)]
    vocabulary = {spell(token): rank for token, rank in rank_of.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    specials = [AddedToken(name, special=True, normalized=False) for name in special_tokens()]
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte: itself where printable, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + index) for index, byte in enumerate(hidden)}
