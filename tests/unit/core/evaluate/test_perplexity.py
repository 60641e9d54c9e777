"""Sums against naive float64 computations over full logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from nexus_cli.core.evaluate import perplexity
from nexus_cli.core.evaluate.perplexity import (
    COLUMNS,
    Subject,
    compare_heads,
    kl_divergence,
    log_probabilities,
    router_overlap,
    score,
)
from nexus_cli.core.evaluate.windows import batches, collated, plan


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every test crosses chunk borders."""
    monkeypatch.setattr(perplexity, "LOGITS_IN_A_CHUNK", 350)  # 7 rows of 50 tokens


def run(
    fakes: SimpleNamespace,
    documents: list,
    *,
    window: int = 64,
    stride: int = 64,
    max_tokens: int = 256,
) -> dict:
    model = fakes.FakeModel()
    groups = batches(plan(documents, window=window, stride=stride), max_tokens=max_tokens)
    sums = score(
        Subject(model),
        Subject(model, shared_experts=False),
        collated(groups, documents),
        num_documents=len(documents),
        top_k=2,
        device="cpu",
    )
    return dict(zip(COLUMNS, sums.T, strict=True))


def naive(
    fakes: SimpleNamespace, ids: list[int], shared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities ``[T-1, V]`` and hidden states of one whole document."""
    model = fakes.FakeModel()
    out = model.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(len(ids))[None],
        use_cache=False,
        shared_experts=shared,
        output_router_logits=True,
    )
    logits = out.last_hidden_state[0] @ model.lm_head.weight.T
    return functional.log_softmax(logits, dim=-1)[:-1], out.router_logits


def test_each_documents_sums_equal_the_naive_ones(fakes: SimpleNamespace) -> None:
    documents = fakes.random_documents(3, [5, 40, 64, 2])
    sums = run(fakes, documents)
    for index, text in enumerate(documents):
        ids = text.input_ids.tolist()
        target = torch.tensor(ids[1:])
        model, routers = naive(fakes, ids, True)
        base, base_routers = naive(fakes, ids, False)
        wanted = {
            "tokens": len(ids) - 1,
            "nll": functional.nll_loss(model, target, reduction="sum"),
            "base_nll": functional.nll_loss(base, target, reduction="sum"),
            "kl": functional.kl_div(model, base, log_target=True, reduction="sum"),
            "top1": (model.argmax(1) == base.argmax(1)).sum(),
            "routers": sum(
                len(set(a.topk(2).indices.tolist()) & set(b.topk(2).indices.tolist())) / 2
                for one, other in zip(routers, base_routers, strict=True)
                for a, b in zip(one[:-1], other[:-1], strict=True)
            )
            / 3,
        }
        for name, value in wanted.items():
            assert float(sums[name][index]) == pytest.approx(float(value), rel=1e-9), name


def test_sums_do_not_depend_on_how_windows_are_batched(fakes: SimpleNamespace) -> None:
    documents = fakes.random_documents(4, [5, 90, 30, 64, 17])
    alone = run(fakes, documents, window=32, stride=8, max_tokens=1)
    together = run(fakes, documents, window=32, stride=8, max_tokens=10_000)
    for name in COLUMNS:
        torch.testing.assert_close(alone[name], together[name], rtol=1e-12, atol=1e-12)


def test_only_assistant_tokens_count_and_values_apart(fakes: SimpleNamespace) -> None:
    text = fakes.document(list(range(20)), scored=[8, 9, 10, 15], values=(9, 10))
    sums = run(fakes, [text])
    logprobs, _ = naive(fakes, list(range(20)), True)
    nll = -logprobs[torch.arange(19), torch.arange(1, 20)]
    assert float(sums["tokens"]) == 4
    assert float(sums["value_tokens"]) == 2
    assert float(sums["nll"]) == pytest.approx(float(nll[[7, 8, 9, 14]].sum()), rel=1e-12)
    assert float(sums["value_nll"]) == pytest.approx(float(nll[[8, 9]].sum()), rel=1e-12)


def test_a_model_against_itself_has_no_distance(fakes: SimpleNamespace) -> None:
    documents = fakes.random_documents(5, [30])
    model = fakes.FakeModel()
    sums = score(
        Subject(model),
        Subject(model),
        collated(batches(plan(documents, window=8, stride=4), max_tokens=64), documents),
        num_documents=1,
        top_k=2,
        device="cpu",
    )
    values = dict(zip(COLUMNS, sums[0].tolist(), strict=True))
    assert values["kl"] == 0.0
    assert values["nll"] == values["base_nll"]
    assert values["top1"] == values["tokens"] == 29
    assert values["routers"] == pytest.approx(29, rel=1e-12)


def test_a_small_kl_is_not_lost_to_rounding() -> None:
    torch.manual_seed(0)
    base = 5 * torch.randn(20, 1000)
    model = base + 1e-4 * torch.randn(20, 1000)
    exact = functional.kl_div(
        model.double().log_softmax(1), base.double().log_softmax(1), log_target=True,
        reduction="none",
    ).sum(1)  # fmt: skip
    found = kl_divergence(base.log_softmax(1), model.log_softmax(1))
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=0)


def test_kl_of_distributions_far_apart_is_finite_and_right() -> None:
    base, model = torch.tensor([[0.0, 200.0]]), torch.tensor([[0.0, -300.0]])
    found = kl_divergence(base.log_softmax(1), model.log_softmax(1))
    assert found.tolist() == [300.0]


def test_half_precision_logits_are_never_rounded() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    exact = functional.log_softmax(hidden.double() @ head.double().T, dim=-1)
    torch.testing.assert_close(
        log_probabilities(hidden, head).double(), exact, rtol=1e-5, atol=1e-5
    )


def test_two_vocabularies_are_refused() -> None:
    hidden, target = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="5 tokens and 6 tokens"):
        compare_heads(hidden, torch.zeros(5, 4), hidden, torch.zeros(6, 4), target)


def test_router_overlap_counts_experts_in_common() -> None:
    one = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    other = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 1.0, 4.0, 2.0]])
    overlap = router_overlap((one,), (other,), torch.tensor([0, 1]), 2)
    assert overlap.tolist() == [0.0, 0.5]
