"""What makes two rows kin: keys that rows share, and the groups that shared keys make."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from rows import Row

BLOCK_OF_CHUNKS = 8  # consecutive chunks of one long book that stay together
_CURLY_QUOTES = "\N{LEFT DOUBLE QUOTATION MARK}(.+?)\N{RIGHT DOUBLE QUOTATION MARK}"
TEMPLATE_RUN = 8  # masked words in common that make two word problems of one template


def kinship_keys(row: Row) -> list[str]:
    """Keys of a row; two rows with a key in common must be on one side of a split.

    Every row has its question and its answer as keys, besides those of its own kind: the tools
    that a conversation names, the file that a function or a page came from, the headword of a
    definition, the template that a word problem was made from.
    """
    fields = row.fields
    keys = [f"content:{_plain(row.content())}"]
    if "messages" in fields:
        keys += [f"question:{_plain(fields['messages'][0]['content'])}"]
        answer = _plain(fields["messages"][-1].get("content") or "")
        keys += [f"answer:{answer}"] if len(answer) > 60 else []
    own_keys = _OWN_KEYS.get(row.stem, _no_keys)
    keys += [f"{row.stem}:{key}" for key in own_keys(row)]
    keys += [f"tool:{key}" for key in _tool_keys(row)]
    return keys


def group_rows(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows that are kin, directly or through other rows (union-find)."""
    rows = list(rows)
    parent = list(range(len(rows)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    first_with: dict[str, int] = {}
    for node, row in enumerate(rows):
        for key in kinship_keys(row):
            parent[root(node)] = root(first_with.setdefault(key, node))
    groups: dict[int, list[Row]] = {}
    for node, row in enumerate(rows):
        groups.setdefault(root(node), []).append(row)
    return list(groups.values())


def tool_names(row: Row) -> set[str]:
    """The functions that a conversation offers or calls."""
    offered = {tool["function"]["name"] for tool in row.fields.get("tools") or []}
    messages = row.fields.get("messages") or []
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    return offered | {call["function"]["name"] for call in calls}


def _tool_keys(row: Row) -> list[str]:
    descriptions = {
        _plain(tool["function"].get("description") or "") for tool in row.fields.get("tools") or []
    }
    return sorted(tool_names(row)) + sorted(text for text in descriptions if len(text) > 20)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _no_keys(_: Row) -> list[str]:
    return []


def _file(row: Row) -> list[str]:
    return [f"{row.fields.get('package', '')}/{row.fields['file']}"]


def _headword(row: Row) -> list[str]:
    found = re.search(_CURLY_QUOTES, _ask(row))
    return [_plain(found.group(1))] if found else []


def _passage(row: Row) -> list[str]:
    return [_ask(row).split("\n\nQuestion:")[0]]


def _module(row: Row) -> list[str]:
    return [str(row.fields["module"]).removesuffix("_composed")]


def _chunk_block(row: Row) -> list[str]:
    return [f"{row.fields.get('book', '')}:{row.index // BLOCK_OF_CHUNKS}"]


def _year(row: Row) -> list[str]:
    return [str(row.fields["year"])]


def _first_line(row: Row) -> list[str]:
    return [str(row.fields["text"]).split("\n", 1)[0]]


def _word_problem_template(row: Row) -> list[str]:
    """Runs of words of the question with names and numbers blotted out."""
    blotted = re.sub(r"\b[A-Z][a-z]+\b", "N", _ask(row))
    words = _plain(re.sub(r"[\d.,/]+", "0", blotted)).split()
    last = max(1, len(words) - TEMPLATE_RUN + 1)
    return [" ".join(words[start : start + TEMPLATE_RUN]) for start in range(last)]


def _ask(row: Row) -> str:
    return str(row.fields["messages"][0]["content"])


_OWN_KEYS: dict[str, Callable[[Row], list[str]]] = {
    "deepmind_mathematics": _module,
    "gsm_symbolic_cot": _word_problem_template,
    "jane_austen": _chunk_block,
    "jargon_file": _headword,
    "math_library_docs": _first_line,
    "postgresql_docs": _file,
    "python_docs": _file,
    "python_functions": _file,
    "qa_boolq": _passage,
    "qa_narrativeqa": _passage,
    "rust_book": _file,
    "sotu": _year,
    "wikipedia_demo": _chunk_block,
    "wordnet_definitions": _headword,
}
