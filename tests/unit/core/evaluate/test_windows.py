"""Every scored token is scored once, from the context that the page promises."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from nexus_cli.core.evaluate.windows import Window, batches, collate, plan


def lm_eval_windows(tokens: list[int], prefix: int, max_len: int) -> list[tuple[list, list]]:
    """``get_rolling_token_windows`` with context_len=1, from its published description."""
    first = min(max_len, len(tokens))
    pairs = [([prefix, *tokens[: first - 1]], tokens[:first])]
    done = first
    while done < len(tokens):
        count = min(len(tokens) - done, max_len)
        end = done + count
        pairs.append((tokens[end - max_len - 1 : end - 1], tokens[end - count : end]))
        done = end
    return pairs


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40])
def test_equal_stride_and_window_are_lm_evals_rolling_windows(
    fakes: SimpleNamespace, length: int
) -> None:
    tokens = list(range(1, length + 1))
    text = fakes.document([99, *tokens])
    ours = [
        (
            text.input_ids[w.begin : w.end].tolist(),
            text.input_ids[w.score_from + 1 : w.end + 1].tolist(),
        )
        for w in plan([text], window=8, stride=8)
    ]
    assert ours == lm_eval_windows(tokens, 99, 8)


def lm_eval_input(context: list[int], target: list[int], max_len: int) -> list[int]:
    """What the harness feeds its model: ``make_disjoint_window``, then ``_loglikelihood_tokens``.

    The first cuts the context off where the target begins, the second joins both again, keeps
    the last ``max_len + 1`` tokens, and leaves out the last, which nothing follows.
    """
    disjoint = context[: len(context) - (len(target) - 1)]
    return [*disjoint, *target][-(max_len + 1) :][:-1]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 40, 41])
def test_a_window_holds_the_tokens_that_lm_evals_model_sees_and_ends_where_it_scores(
    fakes: SimpleNamespace, length: int
) -> None:
    tokens = list(range(1, length + 1))
    text = fakes.document([99, *tokens])
    ours = []
    for window in plan([text], window=8, stride=8):
        batch = collate([window], [text])
        scored = batch.target_BS[batch.scored_BS].tolist()
        ours.append((batch.input_ids_BS[0, : len(window)].tolist(), scored))
    theirs = [(lm_eval_input(*pair, 8), pair[1]) for pair in lm_eval_windows(tokens, 99, 8)]
    assert ours == theirs


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (64, 16), (5, 5)])
def test_every_token_is_scored_once_from_enough_context(
    fakes: SimpleNamespace, window: int, stride: int
) -> None:
    documents = fakes.random_documents(0, [1, 2, 9, 8, 33, 50])
    scored = {}
    for item in plan(documents, window=window, stride=stride):
        assert 0 <= item.begin <= item.score_from < item.end
        assert len(item) <= window
        for position in range(item.score_from, item.end):
            key = (item.document, position + 1)
            assert key not in scored
            scored[key] = position + 1 - item.begin
    wanted = {(d, t) for d, doc in enumerate(documents) for t in range(1, len(doc))}
    assert scored.keys() == wanted
    for (_, target), context in scored.items():
        assert context >= min(target, window - stride + 1)


def test_windows_without_a_scored_token_are_not_run(fakes: SimpleNamespace) -> None:
    text = fakes.document(list(range(40)), scored=[35, 36])
    assert plan([text], window=8, stride=4) == [Window(0, 24, 28, 32), Window(0, 28, 32, 36)][1:]


def test_a_document_of_one_token_has_no_window(fakes: SimpleNamespace) -> None:
    assert plan([fakes.document([5])], window=8, stride=4) == []


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_would_skip_tokens_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        plan([], window=8, stride=stride)


def test_batches_hold_all_windows_within_the_budget(fakes: SimpleNamespace) -> None:
    documents = fakes.random_documents(1, [3, 200, 31, 65, 100, 2, 90])
    windows = plan(documents, window=64, stride=16)
    groups = batches(windows, max_tokens=128)
    assert sorted(map(repr, itertools.chain(*groups))) == sorted(map(repr, windows))
    for group in groups:
        batch = collate(group, documents)
        assert batch.input_ids_BS.numel() <= 128
    assert [len(g[0]) for g in groups] == sorted((len(g[0]) for g in groups), reverse=True)


def test_a_batch_puts_each_target_after_its_input(fakes: SimpleNamespace) -> None:
    text = fakes.document([5, 6, 7, 8, 9], values=(3,))
    batch = collate(plan([text], window=3, stride=2), [text])
    assert batch.input_ids_BS[:, :3].tolist() == [[5, 6, 7], [6, 7, 8]]
    assert batch.target_BS[:, :3].tolist() == [[6, 7, 8], [7, 8, 9]]
    assert batch.scored_BS[:, :3].tolist() == [[True, True, True], [False, False, True]]
    assert batch.value_BS[:, :3].tolist() == [[False, False, True], [False, False, False]]
    assert not batch.scored_BS[:, 3:].any()
    assert torch.equal(batch.position_ids_BS[0], torch.arange(batch.input_ids_BS.shape[1]))
