"""Many documents to token ids over several processes, in order, the same for any number."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

from nexus_cli.core.data.document import Document, LeftOut, TokenizedDocument
from nexus_cli.core.data.errors import UnusableRowError
from nexus_cli.core.data.render import Renderer

CHUNK = 64  # documents handed to a worker at once
AHEAD = 3  # chunks a worker that may be under way, so that memory stays bounded
WORTH_WORKERS = 4096  # documents, some ten seconds of work; a worker takes seconds to start


Result = TokenizedDocument | LeftOut


def tokenize_documents(
    documents: Iterable[Document | LeftOut],
    model_path: Path,
    renderer: Renderer,
    num_processes: int,
) -> Iterator[Result]:
    """Tokenise documents, in order.

    Args:
        documents: read as they are needed; what is left out already stays so.
        model_path: the folder that ``renderer`` is of; workers load their own from it.
        renderer: used in this process.
        num_processes: 1 works in this process; more start workers if there is work for them.

    Raises:
        BadFileError: the chat template cannot be used.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, not {num_processes}")
    remaining = iter(documents)
    if num_processes == 1:
        return (tokenize_one(renderer, document) for document in remaining)
    return _with_workers(remaining, model_path, renderer, num_processes)


def tokenize_one(renderer: Renderer, document: Document | LeftOut) -> Result:
    """Tokenise one document, or say why it is left out."""
    if isinstance(document, LeftOut):
        return document
    try:
        return renderer.tokenize(document)
    except UnusableRowError as reason:
        return LeftOut(str(reason))


def _with_workers(
    documents: Iterator[Document | LeftOut],
    model_path: Path,
    renderer: Renderer,
    num_processes: int,
) -> Iterator[Result]:
    first = list(islice(documents, WORTH_WORKERS))
    if len(first) < WORTH_WORKERS:
        yield from (tokenize_one(renderer, document) for document in first)
        return
    chunks = iter(lambda: list(islice(documents, CHUNK)), [])
    started = (first[start : start + CHUNK] for start in range(0, len(first), CHUNK))
    # Spawned, not forked: this process may hold threads and a GPU.
    executor = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), _start_worker, (model_path,)
    )
    try:
        under_way: deque[Future[list[Result]]] = deque()
        for chunk in chain(started, chunks):
            under_way.append(executor.submit(_tokenize_chunk, chunk))
            if len(under_way) >= AHEAD * num_processes:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_worker_renderer: list[Renderer] = []


def _start_worker(model_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this
    _worker_renderer.append(Renderer.from_folder(model_path))


def _tokenize_chunk(documents: list[Document | LeftOut]) -> list[Result]:
    return [tokenize_one(_worker_renderer[0], document) for document in documents]
