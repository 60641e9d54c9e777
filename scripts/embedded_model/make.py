"""Makes the embedded model and the bundled corpus from a folder of JSONL, in one command.

    python scripts/embedded_model/make.py --corpus DIR --tokenizer-files DIR --output DIR

See the README beside this file.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from architecture import build_model, config_fields
from bundle import write_bundle
from encode import Documents, encode_rows
from evaluate import bits_per_byte
from export import export_model
from report import write_report
from routing import RouterTap, RoutingCounter
from rows import PERMISSIVE_LICENSES, Row, read_corpus
from splits import Split, split_rows
from tokenizer import build_tokenizer, write_generation_config
from train import Recipe, train
from transformers import AutoModelForCausalLM, GptOssForCausalLM

HELD_OUT_SHARES = {"general": 0.04, "code": 0.04, "math": 0.04, "tool_calling": 0.3}
UNSEEN_DOMAIN = "tool_calling"
TRAINABLE_LICENSES = PERMISSIVE_LICENSES | {"ODC-BY-1.0"}  # attribution only, and not shipped
BUNDLE_TOKENS = {
    "general.train": 400_000,
    "general.held-out": 80_000,
    "tool-calling.train": 400_000,
    "tool-calling.held-out": 80_000,
}
SNAPSHOT_EVERY = 600
log = logging.getLogger("embedded_model")


def main() -> None:
    """Run the stages that the command line asks for."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    model_folder = arguments.output / "model"
    model_folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage in ("all", "prepare"):
        _prepare(arguments, model_folder)
    if arguments.stage in ("all", "train"):
        _train(arguments, model_folder)
    if arguments.stage in ("all", "report"):
        facts = json.loads((model_folder / "training_report.json").read_text(encoding="utf-8"))
        write_report(facts, model_folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, help="folder of DOMAIN/*.jsonl(.gz)")
    parser.add_argument("--tokenizer-files", type=Path, help="o200k ranks and chat template")
    parser.add_argument("--output", type=Path, required=True, help="gets model/ and data/")
    parser.add_argument("--work", type=Path, help="token arrays (default: OUTPUT/work)")
    parser.add_argument("--stage", choices=("all", "prepare", "train", "report"), default="all")
    parser.add_argument("--num-steps", type=int, default=2900)
    parser.add_argument("--rows-a-step", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile on each layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--machine", default="one H200 GPU", help="kind of machine, for the card")
    parser.add_argument("--date", default=time.strftime("%Y-%m"), help="for the card")
    arguments = parser.parse_args()
    arguments.work = arguments.work or arguments.output / "work"
    return arguments


def _prepare(arguments: argparse.Namespace, model_folder: Path) -> None:
    """Tokenizer, split, bundled corpus and token arrays: everything that needs no GPU."""
    tokenizer = build_tokenizer(arguments.tokenizer_files, model_folder)
    write_generation_config(tokenizer, model_folder)
    corpus = read_corpus(arguments.corpus)
    split = split_rows([row for row in corpus if _is_trainable(row)], HELD_OUT_SHARES)
    log.info("split: %d train, %d held out", len(split.train), len(split.held_out))
    bundle = write_bundle(split, tokenizer, BUNDLE_TOKENS, arguments.output / "data")
    seen = [row for row in split.train if row.domain != UNSEEN_DOMAIN]
    arguments.work.mkdir(parents=True, exist_ok=True)
    encode_rows(seen, tokenizer).save(arguments.work / "train.npz")
    encode_rows(split.held_out, tokenizer).save(arguments.work / "held_out.npz")
    facts: dict[str, Any] = {
        "data": _data_facts(seen),
        "bundle": bundle,
        "split": _split_facts(split),
    }
    facts["special_ids"] = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    facts["tokenizer"] = len(tokenizer)
    (arguments.work / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _is_trainable(row: Row) -> bool:
    return row.license in TRAINABLE_LICENSES


def _data_facts(seen: Sequence[Row]) -> dict[str, Any]:
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in seen:
        rows[f"{row.domain}/{row.stem}"].append(row)
    return {
        name: {"rows": len(group), "license": ", ".join(sorted({row.license for row in group}))}
        for name, group in rows.items()
    }


def _split_facts(split: Split) -> dict[str, int]:
    return {
        "train_rows": len(split.train),
        "held_out_rows": len(split.held_out),
        "near_duplicates_dropped": len(split.dropped),
    }


def _train(arguments: argparse.Namespace, model_folder: Path) -> None:
    """Train, export, load what was exported with stock transformers, score it, report."""
    documents = Documents.load(arguments.work / "train.npz")
    held_out = Documents.load(arguments.work / "held_out.npz")
    facts = json.loads((arguments.work / "facts.json").read_text(encoding="utf-8"))
    fields = config_fields(facts["tokenizer"], facts["special_ids"])
    recipe = Recipe(
        num_steps=arguments.num_steps,
        rows_a_step=arguments.rows_a_step,
        learning_rate=arguments.learning_rate,
        dropout=arguments.dropout,
        weight_decay=arguments.weight_decay,
        compiles=arguments.compile,
    )
    torch.manual_seed(recipe.seed)
    model = build_model(fields, torch.device(arguments.device))

    def progress(step: int, line: str) -> None:
        log.info("step %d %s", step, line)
        if step % SNAPSHOT_EVERY == 0:
            scores = bits_per_byte(model, held_out, recipe.length, recipe.rows_a_step)
            log.info("held out: %s", _short(scores))
            export_model(model, fields, model_folder)

    began = time.monotonic()
    train(model, documents, recipe, progress)
    minutes = (time.monotonic() - began) / 60
    export_model(model, fields, model_folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts |= _score_exported(model_folder, held_out, recipe, arguments.device)
    log.info("packed: %s", _short(facts["bits_per_byte"]))
    facts["recipe"] = vars(recipe)
    seen = recipe.num_steps * recipe.rows_a_step * recipe.length
    facts["card"] = {
        "parameters": parameters,
        "corpus_tokens": len(documents.tokens),
        "layers": fields["num_hidden_layers"],
        "experts": fields["num_local_experts"],
        "width": fields["hidden_size"],
        "tokenizer": facts["tokenizer"],
        "date": arguments.date,
        "machine": arguments.machine,
        "minutes": round(minutes, 1),
        "seen": seen,
        "epochs": round(seen / len(documents.tokens), 1),
        "length": recipe.length,
        "rounded": recipe.rounded_share,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
    }
    write_report(facts, model_folder)


def _score_exported(
    folder: Path, held_out: Documents, recipe: Recipe, device: str
) -> dict[str, Any]:
    model: GptOssForCausalLM = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).to(device)  # type: ignore[arg-type]
    scores = bits_per_byte(model, held_out, recipe.length, recipe.rows_a_step)
    counter = RoutingCounter(model.config.num_experts_per_tok)
    trained_on = held_out.without_domain(UNSEEN_DOMAIN)
    routing = (RouterTap(model), counter)
    pooled = bits_per_byte(model, trained_on, recipe.length, recipe.rows_a_step, routing)
    scores["trained"] = pooled["all"]
    return {"bits_per_byte": scores, "routing": counter.report()}


def _short(scores: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v['bits_per_byte']}" for k, v in scores.items() if "/" not in k)


if __name__ == "__main__":
    main()
