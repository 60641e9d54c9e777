"""Bits a byte of held-out documents, by domain, and routing over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from encode import Documents
from numpy.typing import NDArray
from packing import IGNORED, attention_masks
from routing import RouterTap, RoutingCounter
from torch import Tensor
from transformers import GptOssForCausalLM


@dataclass(frozen=True)
class _Windows:
    """Windows of documents.

    Attributes:
        inputs: int64 ``[windows, length]``.
        labels: int64 ``[windows, length]``, the next token, -100 past the document's end.
        scored: bool ``[windows, length]``, labels that lie after the document's opening.
        owner: int64 ``[windows]``, the document of each.
    """

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    scored: NDArray[np.bool_]
    owner: NDArray[np.int64]


@dataclass
class _Sums:
    """Nats and tokens by document: after the opening, and of everything."""

    scored_nats: NDArray[np.float64]
    all_nats: NDArray[np.float64]
    scored_tokens: NDArray[np.int64]


def bits_per_byte(
    model: GptOssForCausalLM,
    documents: Documents,
    length: int,
    num_rows: int,
    routing: tuple[RouterTap, RoutingCounter] | None = None,
) -> dict[str, Any]:
    """Score documents and sum up by domain.

    Every token after a document's opening is scored once, in windows that share no context.
    In ``bits_per_byte`` special tokens cost bits and count no bytes, so it errs upwards;
    ``rendered_bits_per_byte`` is over everything a chat renders to, the system message (the same
    in every chat) and special tokens with their spelling included, and flatters.

    Args:
        model: in bf16, on its device.
        documents: what to score.
        length: tokens of a window.
        num_rows: windows of a forward.
        routing: where to count who was routed to.

    Returns:
        ``bits_per_byte``, ``rendered_bits_per_byte``, ``bytes`` and ``tokens`` for each domain,
        each ``domain/file``, and all domains together (``all``).
    """
    windows = _windows(documents, length)
    count = len(documents)
    sums = _Sums(np.zeros(count), np.zeros(count), np.zeros(count, dtype=np.int64))
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # or each new shape would compile again
        for start in range(0, len(windows.owner), num_rows):
            part = slice(start, start + num_rows)
            nats = _score(model, windows.inputs[part], windows.labels[part], routing)
            owner, scored = windows.owner[part], windows.scored[part]
            np.add.at(sums.all_nats, owner, nats.sum(1))
            np.add.at(sums.scored_nats, owner, (nats * scored).sum(1))
            np.add.at(sums.scored_tokens, owner, scored.sum(1))
    model.train(was_training)
    return _by_domain(documents, sums)


def _windows(documents: Documents, length: int) -> _Windows:
    inputs, labels, scored, owner = [], [], [], []
    for index in range(len(documents)):
        opening = int(documents.openings[index])
        for left, right in _window_rows(documents.document(index).astype(np.int64), length):
            padded = np.full((2, length), IGNORED, dtype=np.int64)
            padded[0, : len(left)], padded[1, : len(right)] = left, right
            counts = padded[1] != IGNORED
            if not owner or owner[-1] != index:
                counts[: opening - 1] = False
            scored.append(counts)
            inputs.append(np.maximum(padded[0], 0))
            labels.append(padded[1])
            owner.append(index)
    return _Windows(np.stack(inputs), np.stack(labels), np.stack(scored), np.asarray(owner))


def _window_rows(
    tokens: NDArray[np.int64], length: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1]
        yield window[:-1], window[1:]


@torch.no_grad()
def _score(
    model: GptOssForCausalLM,
    inputs: NDArray[np.int64],
    labels: NDArray[np.int64],
    routing: tuple[RouterTap, RoutingCounter] | None,
) -> NDArray[np.float64]:
    """Nats of each label ``[windows, length]``, 0 where there is none."""
    device = model.lm_head.weight.device
    ids, wanted = torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    masks = attention_masks(positions[:1], model.config.sliding_window)
    hidden: Tensor = model.model(ids, attention_mask=masks, position_ids=positions)[0]
    logits = model.lm_head(hidden).float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    if routing is not None:
        tap, counter = routing
        counter.add(tap.take(), wanted.flatten() != IGNORED)
    nats: NDArray[np.float64] = losses.view_as(wanted).double().cpu().numpy()
    return nats


def _by_domain(documents: Documents, sums: _Sums) -> dict[str, Any]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(documents.labels.tolist()):
        for name in (label.split("/")[0], label, "all"):
            members[name].append(index)
    scores = {}
    for name, rows in sorted(members.items()):
        size, rendered = documents.num_bytes[rows].sum(), documents.num_rendered_bytes[rows].sum()
        bits, all_bits = sums.scored_nats[rows].sum(), sums.all_nats[rows].sum()
        scores[name] = {
            "bits_per_byte": round(float(bits / np.log(2) / size), 4),
            "rendered_bits_per_byte": round(float(all_bits / np.log(2) / rendered), 4),
            "bytes": int(size),
            "tokens": int(sums.scored_tokens[rows].sum()),
        }
    return scores
