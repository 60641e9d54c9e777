"""How a document is cut into forward passes, and which tokens each of them scores.

Every scored token is scored once. A window holds at most ``window`` input tokens; each
following window ends ``stride`` tokens further and reaches back as far as it can, so that
all but the first ``window`` tokens of a document are predicted from more than
``window - stride`` tokens. With ``stride == window``, behind a BOS token, these are the
rolling windows of lm-evaluation-harness (``get_rolling_token_windows``, context length 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_cli.core.data.document import TokenizedDocument

# T tokens of a document   B windows of a batch   S input positions of a batch

PAD_TO = 32  # batch lengths are multiples of this, so that few shapes occur


@dataclass(frozen=True)
class Window:
    """Inputs ``begin .. end`` of a document; those from ``score_from`` on predict for the sums."""

    document: int
    begin: int
    score_from: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class WindowBatch:
    """Windows padded on the right; causal attention needs no mask for that.

    Attributes:
        input_ids_BS: int64; 0 in the padding.
        position_ids_BS: int64, 0, 1, 2, ... in every window, through the padding too.
        target_BS: int64, the token that follows each input.
        scored_BS: bool, where the target counts.
        value_BS: bool, where it counts and belongs to an argument value.
        document_B: int64 index of the document.
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    target_BS: Tensor
    scored_BS: Tensor
    value_BS: Tensor
    document_B: Tensor

    def to(self, device: torch.device | str) -> WindowBatch:
        """The same batch on ``device``."""
        return WindowBatch(**{name: value.to(device) for name, value in vars(self).items()})


def plan(documents: Sequence[TokenizedDocument], *, window: int, stride: int) -> list[Window]:
    """Windows of every document that has tokens to score; those that score none are left out.

    Raises:
        ValueError: If not ``1 <= stride <= window``.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride ({stride}) must be between 1 and the window ({window})")
    windows = []
    for index, document in enumerate(documents):
        inputs = len(document) - 1  # nothing follows the last token
        done = 0
        while done < inputs:
            end = min(window if done == 0 else done + stride, inputs)
            if document.loss_mask[done + 1 : end + 1].any():
                windows.append(Window(index, max(0, end - window), done, end))
            done = end
    return windows


def batches(windows: Sequence[Window], *, max_tokens: int) -> list[list[Window]]:
    """Group windows of like length, longest first, in at most ``max_tokens`` padded tokens.

    A window longer than that is a batch of its own. The result depends on nothing but the
    arguments, so ranks can take turns.
    """
    groups: list[list[Window]] = []
    room = 0
    for item in sorted(windows, key=lambda w: (-len(w), w.document, w.begin)):
        if not room:
            groups.append([])
            room = max(1, max_tokens // _padded(len(item)))
        groups[-1].append(item)
        room -= 1
    return groups


def collate(group: Sequence[Window], documents: Sequence[TokenizedDocument]) -> WindowBatch:
    """The tensors of a group of windows, on the CPU."""
    length = _padded(max(map(len, group)))
    shape = (len(group), length)
    ids_BS = torch.zeros(shape, dtype=torch.int64)
    target_BS = torch.zeros(shape, dtype=torch.int64)
    scored_BS = torch.zeros(shape, dtype=torch.bool)
    value_BS = torch.zeros(shape, dtype=torch.bool)
    for row, item in enumerate(group):
        document = documents[item.document]
        ids_T = torch.from_numpy(document.input_ids[item.begin : item.end + 1])
        ids_BS[row, : len(item)] = ids_T[:-1]
        target_BS[row, : len(item)] = ids_T[1:]
        into = slice(item.score_from - item.begin, len(item))
        counted = slice(item.score_from + 1, item.end + 1)
        scored_BS[row, into] = torch.from_numpy(document.loss_mask[counted])
        value_BS[row, into] = torch.from_numpy(document.value_mask[counted])
    return WindowBatch(
        input_ids_BS=ids_BS,
        position_ids_BS=torch.arange(length).expand(shape),
        target_BS=target_BS,
        scored_BS=scored_BS,
        value_BS=value_BS,
        document_B=torch.tensor([item.document for item in group]),
    )


def collated(
    groups: Sequence[Sequence[Window]], documents: Sequence[TokenizedDocument]
) -> Iterator[WindowBatch]:
    """Every group's tensors, one at a time."""
    for group in groups:
        yield collate(group, documents)


def _padded(length: int) -> int:
    return -(-length // PAD_TO) * PAD_TO
