"""The small corpus that ships with the package, picked from the split by source and length."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from encode import encode_rows
from rows import Row, write_jsonl
from splits import Split
from transformers import PreTrainedTokenizerFast

# Files whose texts and licences the package's NOTICE lists. Question sets that people use as
# benchmarks are not among them, nor are sources whose licence text could not be had.
SHIPPED_FILES = frozenset(
    {
        "bfcl_single_turn",
        "codeio",
        "deepmind_mathematics",
        "gsm_symbolic_cot",
        "jane_austen",
        "jargon_file",
        "kto_en_demo_good",
        "math_library_docs",
        "postgresql_docs",
        "python_docs",
        "python_functions",
        "rust_book",
        "sotu",
        "wordnet_definitions",
    }
)
SHIPPED_PACKAGES = frozenset(
    {
        *("CPython", "click", "fonttools", "jinja2", "mpmath", "networkx"),
        *("pytest", "rich", "sympy", "transformers"),
    }
)
MAX_TOKENS_A_ROW = 1000
DOMAIN_SHARES = {"general": 0.4, "code": 0.35, "math": 0.25}
_KEPT_FIELDS = ("messages", "tools", "text")


def write_bundle(
    split: Split, tokenizer: PreTrainedTokenizerFast, budgets: Mapping[str, int], output: Path
) -> dict[str, dict[str, Any]]:
    """Write the four files of the bundled corpus.

    Args:
        split: the split of the whole corpus; train files take from its training side only.
        tokenizer: the embedded model's.
        budgets: tokens for each file, by ``general.train`` and so on.
        output: the data folder.

    Returns:
        For each file its rows, tokens, and rows by source file.
    """
    output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, dict[str, Any]] = {}
    for side, rows in (("train", split.train), ("held-out", split.held_out)):
        lengths = _lengths([row for row in rows if _may_ship(row)], tokenizer)
        for name in ("general", "tool-calling"):
            file = f"{name}.{side}"
            shares = DOMAIN_SHARES if name == "general" else {"tool_calling": 1.0}
            picked: list[Row] = []
            for domain, share in shares.items():
                candidates = [row for row in lengths if row.domain == domain]
                picked += _pick(candidates, lengths, int(share * budgets[file]))
            picked.sort(key=_order)
            write_jsonl(output / f"{file}.jsonl.gz", [_shipped_fields(row) for row in picked])
            facts[file] = _facts(picked, lengths)
    return facts


def _may_ship(row: Row) -> bool:
    package = str(row.fields.get("package", "CPython")).split()[0]
    return row.is_permissive and row.stem in SHIPPED_FILES and package in SHIPPED_PACKAGES


def _lengths(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> dict[Row, int]:
    lengths = encode_rows(rows, tokenizer).lengths()
    pairs = zip(rows, lengths.tolist(), strict=True)
    return {row: length for row, length in pairs if length <= MAX_TOKENS_A_ROW}


def _pick(candidates: Iterable[Row], lengths: Mapping[Row, int], budget: int) -> list[Row]:
    """Rows up to a budget of tokens, as evenly over their files as the files allow."""
    waiting: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(candidates, key=_order, reverse=True):
        waiting[row.stem].append(row)
    taken = dict.fromkeys(waiting, 0)
    picked: list[Row] = []
    while waiting and sum(taken.values()) < budget:
        stem = min(waiting, key=lambda name: (taken[name], name))
        row = waiting[stem].pop()
        picked.append(row)
        taken[stem] += lengths[row]
        if not waiting[stem]:
            del waiting[stem]
    return picked


def _order(row: Row) -> str:
    return hashlib.sha256(f"bundle {row.uuid}".encode()).hexdigest()


def _shipped_fields(row: Row) -> dict[str, Any]:
    kept = {key: row.fields[key] for key in _KEPT_FIELDS if key in row.fields}
    head = {"uuid": row.uuid, "license": row.license, "source": row.source, "category": row.domain}
    return head | kept


def _facts(picked: list[Row], lengths: Mapping[Row, int]) -> dict[str, Any]:
    by_stem: dict[str, int] = defaultdict(int)
    for row in picked:
        by_stem[row.stem] += 1
    tokens = sum(lengths[row] for row in picked)
    return {"rows": len(picked), "tokens": tokens, "rows_by_source": dict(sorted(by_stem.items()))}
