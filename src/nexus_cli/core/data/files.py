"""Which files hold text, and how each kind is read: one row after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nexus_cli.core.data.arrow_files import read_arrow, read_parquet
from nexus_cli.core.data.errors import BadFileError, bad_file
from nexus_cli.core.data.text_files import COMPRESSED, read_json, read_jsonl, read_plain

Reader = Callable[[Path], Iterator[tuple[int, Any]]]

READERS: dict[str, Reader] = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".txt": read_plain,
}
KINDS = ".parquet, .arrow, .jsonl, .json or .txt, the text ones also as .gz or .zst"
TABLES = (".parquet", ".arrow", ".jsonl", ".ndjson")
BINARY = (".parquet", ".arrow")
SAVED = "state.json"  # marks a folder of datasets' save_to_disk
SAVED_SPLITS = "dataset_dict.json"  # marks a folder of such folders


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read; None if it is not a file of text."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] in BINARY:
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield a number (the line of a line-based file, else the row; from 1) and the row's value.

    Raises:
        BadFileError: the file is empty, broken, or of no known kind.
    """
    kind = kind_of(path)
    if kind is None:
        raise bad_file(path, None, "not a file of text", f"Known kinds: {KINDS}.")
    return READERS[kind](path)


def find_files(path: Path) -> list[Path]:
    """The files of text under a path: itself, a ``save_to_disk`` folder's, or a folder's.

    In a folder, .json and .txt files count only where there are no tables (Parquet, Arrow,
    JSON Lines), because beside those they are metadata and licences. Hidden ones never count.

    Raises:
        BadFileError: there is none, or the folder is a ``save_to_disk`` one and incomplete.
    """
    if path.is_file():
        if kind_of(path) is None:
            raise bad_file(path, None, "not a file of text", f"Known kinds: {KINDS}.")
        return [path]
    if (path / SAVED_SPLITS).is_file():
        splits = _json(path / SAVED_SPLITS).get("splits", [])
        if "train" not in splits:
            hint = f"Name the folder of one split: {', '.join(map(str, splits))}"
            raise bad_file(path, None, "saved splits, and none is called train", hint)
        path = path / "train"
    if (path / SAVED).is_file():
        return _saved(path)
    files = [file for file in sorted(path.rglob("*")) if _counts(path, file)]
    tables = [file for file in files if kind_of(file) in TABLES]
    if not files:
        raise bad_file(path, None, "a folder without files of text", f"Known kinds: {KINDS}.")
    return tables or files


def _saved(path: Path) -> list[Path]:
    listed = _json(path / SAVED).get("_data_files", [])
    files = [path / Path(str(entry["filename"])).name for entry in listed]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise bad_file(path, None, f"an incomplete save_to_disk folder: {missing} missing")
    return files


def _counts(root: Path, file: Path) -> bool:
    parts = file.relative_to(root).parts
    return file.is_file() and kind_of(file) is not None and not any(p[0] == "." for p in parts)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise bad_file(path, None, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadFileError(f"{path}: not a JSON object")
    return value
