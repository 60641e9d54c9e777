"""What stock transformers makes of a model folder; compatibility.py runs it where Nexus is not.

python compatibility_check.py FOLDER REFERENCE

``REFERENCE`` is what Nexus computes from the folder (compatibility.py writes it): ``text``,
``logits`` float32 ``[1, S, V]``, and ``greedy``, the tokens that follow. The last line of the
output is one JSON object: for each check whether it holds, and the figure or words behind that.
Only torch and transformers are imported.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LOGITS = 1e-4  # largest absolute difference in float32 that passes for equal
NEW_TOKENS = 16

Found = tuple[bool, Any]  # whether a check holds, and what it saw


@dataclass(frozen=True)
class Loaded:
    """A folder as stock transformers loads it, and what Nexus makes of it."""

    folder: str
    model: Any
    tokenizer: Any
    reference: dict[str, Any]

    def encode(self, *texts: str, **options: Any) -> Any:
        """``input_ids`` and ``attention_mask`` ``[B, S]``."""
        return self.tokenizer(list(texts), return_tensors="pt", **options)

    def generate(self, inputs: Any, **options: Any) -> list[list[int]]:
        """The new tokens of each row, by transformers' own ``generate``."""
        out = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)
        rows: list[list[int]] = out[:, inputs["input_ids"].shape[1] :].tolist()
        return rows


def without_nexus(_: Loaded) -> Found:
    """Nexus is not installed here, so nothing of it helps."""
    return importlib.util.find_spec("nexus_cli") is None, transformers.__version__


def classes(it: Loaded) -> Found:
    """Config and model are those of the file that travels with the folder."""
    config = AutoConfig.from_pretrained(it.folder, trust_remote_code=True)
    names = type(config).__name__, type(it.model).__name__
    return names == ("NexusGptOssConfig", "NexusGptOssForCausalLM"), names


def logits(it: Loaded) -> Found:
    """Logits are those of Nexus."""
    with torch.no_grad():
        found = it.model(**it.encode(it.reference["text"])).logits
    worst = float((found - it.reference["logits"]).abs().max())
    return found.dtype == torch.float32 and worst <= LOGITS, worst


def greedy(it: Loaded) -> Found:
    """The most likely tokens are those that Nexus generates, the stop token too."""
    found = it.generate(it.encode(it.reference["text"]), do_sample=False)[0]
    return found == it.reference["greedy"], len(found)


def cache(it: Loaded) -> Found:
    """Greedy tokens are the same with a cache and without."""
    inputs = it.encode(it.reference["text"])
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS}
    with_cache, without = (it.generate(inputs, use_cache=on, **options) for on in (True, False))
    return with_cache == without, len(with_cache[0])


def sampling(it: Loaded) -> Found:
    """Sampled tokens are the seed's, with a cache and without, and not the greedy ones."""
    inputs = it.encode(it.reference["text"])
    options: dict[str, Any] = {"min_new_tokens": NEW_TOKENS}

    def draw(seed: int, use_cache: bool) -> list[list[int]]:
        torch.manual_seed(seed)
        return it.generate(inputs, do_sample=True, use_cache=use_cache, **options)

    rows = draw(1, True), draw(1, True), draw(1, False), draw(2, True)
    same = rows[0] == rows[1] == rows[2]
    return same and rows[0] != rows[3], len({str(row) for row in rows})


def left_padding(it: Loaded) -> Found:
    """A batch padded on the left gives the tokens that each prompt gives alone."""
    text = it.reference["text"]
    prompts = text, text[: len(text) // 3], "To be"
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS}
    alone = [it.generate(it.encode(prompt), **options)[0] for prompt in prompts]
    batch = it.encode(*prompts, padding=True, padding_side="left")
    padding = (batch["attention_mask"] == 0).sum(1).tolist()
    return it.generate(batch, **options) == alone and max(padding) > 0, padding


def refuses(load: Callable[..., Any]) -> Callable[[Loaded], Found]:
    """A check that ``load`` fails without trust, its last line saying what to pass."""

    def check(it: Loaded) -> Found:
        try:
            loaded = load(it.folder, trust_remote_code=False)
        except ValueError as error:
            said = str(error).strip().splitlines()[-1]  # before it, where the code can be read
            return "trust_remote_code=True" in said, f"ValueError: {said}"
        return False, f"it loaded as {type(loaded).__name__}"

    return check


CHECKS: dict[str, Callable[[Loaded], Found]] = {
    "Nexus is not installed": without_nexus,
    "the Auto classes load its own classes": classes,
    "logits are those of Nexus": logits,
    "greedy tokens are those of Nexus": greedy,
    "with a cache as without": cache,
    "sampling with a seed": sampling,
    "a batch padded on the left": left_padding,
    "AutoConfig refuses without trust": refuses(AutoConfig.from_pretrained),
    "AutoModelForCausalLM refuses without trust": refuses(AutoModelForCausalLM.from_pretrained),
}


def main(folder: str, reference: str) -> None:
    """Load the folder, make every check, and print what was found."""
    transformers.logging.set_verbosity_error()
    options = {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    it = Loaded(folder, model.eval(), tokenizer, torch.load(reference, weights_only=True))
    found = {}
    for name, check in CHECKS.items():
        try:
            holds, saw = check(it)
        except Exception as error:  # noqa: BLE001  one that breaks does not hide the others
            holds, saw = False, f"{type(error).__name__}: {error}"
        found[name] = {"holds": holds, "saw": saw}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
