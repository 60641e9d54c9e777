import pytest
import torch
from scipy.special import logsumexp

from nexus_cli.core.distill.topk import top_k

# Shape letters: N positions, H hidden size, V vocabulary.

N, H, V = 9, 5, 40


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    labels_N = torch.randint(V, (N,))
    return torch.randn(N, H).to(dtype), (3 * torch.randn(V, H)).to(dtype), labels_N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7])
def test_it_keeps_the_likeliest_tokens_the_rest_and_the_nll_of_the_label(dtype, k):
    hidden_NH, head_VH, labels_N = problem(dtype)
    logits_NV = hidden_NH.double() @ head_VH.double().T
    logp_NV = logits_NV.numpy() - logsumexp(logits_NV.numpy(), axis=1, keepdims=True)

    kept = top_k(hidden_NH, head_VH, labels_N, k, chunk_size=4)

    for n in range(N):
        order = (-logp_NV[n]).argsort(kind="stable")
        assert kept.ids_NK[n].tolist() == order[:k].tolist()
        assert kept.logprobs_NK[n].tolist() == pytest.approx(logp_NV[n][order[:k]], abs=1e-5)
        assert kept.tail_logprob_N[n].item() == pytest.approx(
            logsumexp(logp_NV[n][order[k:]]), abs=1e-5
        )
        assert kept.nll_N[n].item() == pytest.approx(-logp_NV[n][labels_N[n]], abs=1e-5)


def test_the_kept_and_the_rest_sum_to_one():
    kept = top_k(*problem(), 6)
    total_N = kept.logprobs_NK.exp().sum(-1) + kept.tail_logprob_N.exp()
    torch.testing.assert_close(total_N, torch.ones(N))


def test_the_whole_vocabulary_leaves_no_tail():
    assert (top_k(*problem(), V).tail_logprob_N == -torch.inf).all()


def test_a_tail_too_small_for_a_difference_from_one_is_still_there():
    head_VH = torch.eye(3)
    hidden_NH = torch.tensor([[40.0, 0.0, 0.0]])
    kept = top_k(hidden_NH, head_VH, torch.tensor([0]), 1)
    assert kept.tail_logprob_N.item() == pytest.approx(
        torch.tensor(2.0).log().item() - 40, abs=1e-4
    )


def test_more_entries_than_tokens_are_refused():
    with pytest.raises(ValueError, match="cannot keep 41 of 40"):
        top_k(*problem(), V + 1)


def test_no_position_gives_empty_answers():
    hidden_NH, head_VH, labels_N = problem()
    kept = top_k(hidden_NH[:0], head_VH, labels_N[:0], 7)
    assert kept.ids_NK.shape == kept.logprobs_NK.shape == (0, 7)
    assert kept.tail_logprob_N.shape == kept.nll_N.shape == (0,)
