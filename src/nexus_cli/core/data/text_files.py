"""Rows of JSON Lines, JSON and plain-text files, compressed or not, a bounded piece at a time."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from nexus_cli.core.data.errors import bad_file

COMPRESSED = (".gz", ".zst")
CHUNK = 1 << 20  # characters read at once from a JSON array
PIECE = 8192  # characters of a plain text that make one document, at most
EMPTY = "the file is empty"
LFS_POINTER = "version https://git-lfs"
LFS_HINT = "Fetch the real file: git lfs pull"


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the line number, counted from 1, and the value of every line that is not blank.

    Raises:
        BadFileError: the file is empty, broken, not UTF-8, or has a line that is no JSON.
    """
    found = False
    with open_bytes(path) as stream:
        for number, line in enumerate(_lines(path, stream), start=1):
            if not line.strip():
                continue
            found = True
            yield number, _parse(path, number, _decode(path, number, line))
    if not found:
        raise bad_file(path, None, EMPTY)


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSON array, of one object, or of JSON Lines under the name ``.json``.

    Raises:
        BadFileError: as :func:`read_jsonl`.
    """
    with open_text(path) as stream:
        head = _read(path, stream, CHUNK)
        if head.lstrip("\ufeff \t\r\n").startswith("["):
            yield from _array(path, stream, head.lstrip("\ufeff \t\r\n")[1:])
            return
        first = next((line for line in head.splitlines() if line.strip()), "")
    if _is_json(first) or not first:
        yield from read_jsonl(path)
        return
    with open_text(path) as stream:
        yield 1, _parse(path, None, _read(path, stream, -1))


def read_plain(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield pieces of at most ``PIECE`` characters as rows with ``text``, cut at blank lines.

    Pieces, not the whole file, so that a book has a part to hold out, and memory stays bounded.

    Raises:
        BadFileError: the file is empty, broken, or not UTF-8.
    """
    piece: list[str] = []
    number = size = 0
    with open_bytes(path) as stream:
        for line_number, raw in enumerate(_lines(path, stream), start=1):
            line = _decode(path, line_number, raw)
            blank = not line.strip()
            if piece and (size + len(line) > PIECE or (blank and size > PIECE // 2)):
                number += 1
                yield number, {"text": "".join(piece)}
                piece, size = [], 0
            if piece or not blank:
                piece.append(line)
                size += len(line)
    if piece:
        yield number + 1, {"text": "".join(piece)}
    elif number == 0:
        raise bad_file(path, None, EMPTY)


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed by its suffix."""
    if path.suffix == ".gz":
        with gzip.open(path) as stream:
            yield cast(IO[bytes], stream)
    elif path.suffix == ".zst":
        with pa.input_stream(str(path), compression="zstd") as native:
            yield cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, native)))
    else:
        with path.open("rb") as plain:
            yield plain


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a file for reading as UTF-8, decompressed by its suffix."""
    with open_bytes(path) as stream:
        yield io.TextIOWrapper(cast(io.BufferedReader, stream), encoding="utf-8")


def _lines(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from stream
    except (OSError, EOFError, zlib.error) as error:
        raise bad_file(path, None, f"cannot be read to its end: {error}") from error


def _read(path: Path, stream: IO[str], size: int) -> str:
    try:
        return stream.read(size)
    except UnicodeDecodeError as error:
        raise bad_file(path, None, f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise bad_file(path, None, f"cannot be read to its end: {error}") from error


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise bad_file(path, number, f"not UTF-8: {error.reason} at byte {error.start}") from error


def _parse(path: Path, number: int | None, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = LFS_HINT if text.startswith(LFS_POINTER) else None
        raise bad_file(path, number, f"not JSON: {error}", hint) from error


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _array(path: Path, stream: IO[str], text: str) -> Iterator[tuple[int, Any]]:
    """Decode one element after the other, reading on only where one is incomplete."""
    decoder = json.JSONDecoder()
    number, size = 0, CHUNK
    while True:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            break
        try:
            value, end = decoder.raw_decode(text)
        except ValueError as error:
            more = _read(path, stream, size)
            if not more:
                raise bad_file(path, None, f"not JSON, row {number + 1}: {error}") from error
            text, size = text + more, size * 2
            continue
        number, size, text = number + 1, CHUNK, text[end:]
        yield number, value
    if number == 0:
        raise bad_file(path, None, "the file holds no rows")
