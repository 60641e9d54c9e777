import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import chisquare

from nexus_cli.core.distill.teacher import TAIL_TEMPERATURES, TopKSignal
from nexus_cli.core.distill.topk import TopK, nucleus, tail_samples, top_k

# Shape letters: N positions, H hidden size, V vocabulary, K kept entries, T temperatures.

N, H, V = 9, 5, 40


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    labels_N = torch.randint(V, (N,))
    return torch.randn(N, H).to(dtype), (3 * torch.randn(V, H)).to(dtype), labels_N


def logprobs_of(hidden_NH, head_VH):
    """Log-probabilities in numpy's float64 ``[N, V]``."""
    logits_NV = (hidden_NH.double() @ head_VH.double().T).numpy()
    return logits_NV - logsumexp(logits_NV, axis=1, keepdims=True)


def power_sums(logp):
    return [logsumexp(logp / temperature) for temperature in TAIL_TEMPERATURES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7])
def test_it_keeps_the_likeliest_tokens_the_rest_and_the_nll_of_the_label(dtype, k):
    hidden_NH, head_VH, labels_N = problem(dtype)
    logp_NV = logprobs_of(hidden_NH, head_VH)

    kept = top_k(hidden_NH, head_VH, labels_N, k, chunk_size=4)

    assert kept.tail_samples_Nm is None
    for n in range(N):
        order = (-logp_NV[n]).argsort(kind="stable")
        assert kept.ids_NK[n].tolist() == order[:k].tolist()
        assert kept.logprobs_NK[n].tolist() == pytest.approx(logp_NV[n][order[:k]], abs=1e-5)
        assert kept.tails_NT[n].tolist() == pytest.approx(
            power_sums(logp_NV[n][order[k:]]), abs=1e-5
        )
        assert kept.nll_N[n].item() == pytest.approx(-logp_NV[n][labels_N[n]], abs=1e-5)


def test_the_kept_and_the_rest_sum_to_one():
    kept = top_k(*problem(), 6)
    total_N = kept.logprobs_NK.exp().sum(-1) + kept.tails_NT[:, 0].exp()
    torch.testing.assert_close(total_N, torch.ones(N))


def test_the_whole_vocabulary_leaves_no_tail():
    assert (top_k(*problem(), V).tails_NT == -torch.inf).all()


def test_a_tail_too_small_for_a_difference_from_one_is_still_there():
    head_VH = torch.eye(3)
    hidden_NH = torch.tensor([[400.0, 0.0, 0.0]])
    kept = top_k(hidden_NH, head_VH, torch.tensor([0]), 1)
    expected = [np.log(2) - 400 / temperature for temperature in TAIL_TEMPERATURES]
    assert kept.tails_NT[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="cannot keep 41 of 40"):
        top_k(*problem(), V + 1)
    with pytest.raises(ValueError, match="cannot draw -1"):
        top_k(*problem(), 2, num_tail_samples=-1)
    with pytest.raises(ValueError, match="at least 3 of 2"):
        top_k(*problem(), 2, min_k=3)
    for top_p in (0.0, 1.1):
        with pytest.raises(ValueError, match="top_p lies above 0"):
            top_k(*problem(), 2, top_p=top_p)


def test_no_position_gives_empty_answers():
    hidden_NH, head_VH, labels_N = problem()
    kept = top_k(hidden_NH[:0], head_VH, labels_N[:0], 7, top_p=0.9, num_tail_samples=2)
    assert kept.ids_NK.shape == kept.logprobs_NK.shape == (0, 7)
    assert kept.tails_NT.shape == (0, 3)
    assert kept.nll_N.shape == (0,)
    assert kept.tail_samples_Nm.shape == (0, 2)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("min_k", [1, 3, 12])
@pytest.mark.parametrize("seed", range(3))
def test_the_nucleus_is_that_of_a_loop_and_loses_nothing(top_p, min_k, seed):
    torch.manual_seed(seed)
    hidden_NH = torch.randn(50, H) * torch.rand(50, 1)
    head_VH, labels_N = problem()[1], torch.zeros(50, dtype=torch.long)
    whole = top_k(hidden_NH, head_VH, labels_N, 12)
    kept = nucleus(whole, top_p, min_k)
    logp_NV = logprobs_of(hidden_NH, head_VH)
    total_N = kept.logprobs_NK.exp().sum(-1) + kept.tails_NT[:, 0].exp()
    torch.testing.assert_close(total_N, torch.ones(50), rtol=0, atol=1e-6)
    for n in range(50):
        mass, count = 0.0, 0
        while count < 12 and (mass < top_p or count < min_k):
            mass += np.exp(whole.logprobs_NK[n, count].double().item())
            count += 1
        assert torch.equal(kept.logprobs_NK[n, :count], whole.logprobs_NK[n, :count])
        assert (kept.logprobs_NK[n, count:] == -torch.inf).all()
        left_V = np.delete(logp_NV[n], kept.ids_NK[n, :count].numpy())
        assert kept.tails_NT[n].tolist() == pytest.approx(power_sums(left_V), abs=1e-5)


def of_probabilities(*p_K):
    """Entries with these probabilities, and no tail if they sum to one."""
    tail = torch.tensor([1 - sum(p_K)]).log().expand(3)
    logprobs_NK = torch.tensor([p_K], dtype=torch.float64).log()
    return TopK(torch.arange(len(p_K))[None], logprobs_NK, tail[None], torch.zeros(1))


def test_the_entry_that_reaches_the_mass_is_kept_and_the_next_is_not():
    kept = of_probabilities(0.5, 0.25, 0.125, 0.125)
    for top_p, count in ((0.5, 1), (0.5 + 1e-9, 2), (0.75, 2), (0.875, 3), (0.9, 4), (1.0, 4)):
        used = nucleus(kept, top_p, 1).logprobs_NK > -torch.inf
        assert used.sum() == count
    assert (nucleus(kept, 0.5, 3).logprobs_NK > -torch.inf).sum() == 3


def test_a_top_p_of_one_keeps_entries_that_no_sum_notices():
    certain = TopK(
        torch.arange(3)[None], torch.tensor([[0.0, -60, -70]]), torch.full((1, 3), -80.0),
        torch.zeros(1),
    )  # fmt: skip
    assert nucleus(certain, 1.0, 1) is certain
    assert nucleus(certain, 0.999, 1).logprobs_NK.tolist() == [[0.0, -torch.inf, -torch.inf]]


def test_a_second_nucleus_changes_nothing():
    kept = nucleus(top_k(*problem(), 12), 0.8, 2)
    again = nucleus(kept, 0.8, 2)
    for name in ("ids_NK", "logprobs_NK", "tails_NT", "nll_N"):
        assert torch.equal(getattr(kept, name), getattr(again, name))


def test_a_nucleus_after_the_samples_is_refused():
    kept = top_k(*problem(), 12, num_tail_samples=1)
    with pytest.raises(ValueError, match="smaller tail"):
        nucleus(kept, 0.5, 1)


@pytest.mark.parametrize("vocabulary", [40, 512, 1300])
def test_samples_follow_the_tail_and_never_name_a_kept_token(vocabulary):
    torch.manual_seed(0)
    logits_CV = torch.randn(1, vocabulary) / 2  # tame, so that no count is too small to judge
    ids_CK = logits_CV.topk(7).indices
    p_V = torch.softmax(logits_CV[0].double().index_fill(0, ids_CK[0], -torch.inf), 0)
    generator = torch.Generator().manual_seed(1)
    drawn_Cm = tail_samples(logits_CV.repeat(100, 1), ids_CK.expand(100, -1), 500, generator)
    assert drawn_Cm.shape == (100, 500)
    assert drawn_Cm.dtype == torch.int64
    assert not torch.isin(drawn_Cm, ids_CK).any()
    counts_V = torch.bincount(drawn_Cm.flatten(), minlength=vocabulary)
    expected_V = p_V * drawn_Cm.numel()
    tail_V = p_V > 0
    assert expected_V[tail_V].min() > 5
    assert chisquare(counts_V[tail_V].numpy(), expected_V[tail_V].numpy()).pvalue > 0.01


def test_each_row_is_sampled_from_its_own_tail_with_the_seed_deciding():
    hidden_NH, head_VH, labels_N = problem()
    draws = [
        top_k(
            hidden_NH, head_VH, labels_N, 12, chunk_size=4, top_p=0.7, num_tail_samples=50,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert torch.equal(draws[0].tail_samples_Nm, draws[1].tail_samples_Nm)
    assert not torch.equal(draws[0].tail_samples_Nm, draws[2].tail_samples_Nm)
    named_again = 0
    for n in range(N):
        used_K = draws[0].logprobs_NK[n] > -torch.inf
        assert not torch.isin(draws[0].tail_samples_Nm[n], draws[0].ids_NK[n][used_K]).any()
        named_again += torch.isin(draws[0].tail_samples_Nm[n], draws[0].ids_NK[n][~used_K]).sum()
    assert named_again > 0  # what the nucleus leaves out is drawn


def test_an_empty_tail_is_marked():
    kept = top_k(*problem(), V, num_tail_samples=3)
    assert (kept.tail_samples_Nm == -1).all()
    assert (top_k(*problem(), V, top_p=0.5, num_tail_samples=3).tail_samples_Nm >= 0).all()


@pytest.mark.parametrize("k", [1, 6, V])
@pytest.mark.parametrize("temperature", TAIL_TEMPERATURES)
def test_a_signal_at_a_temperature_is_the_softened_distribution(k, temperature):
    hidden_NH, head_VH, labels_N = problem()
    kept = top_k(hidden_NH, head_VH, labels_N, k)
    signal = TopKSignal(kept.ids_NK, kept.logprobs_NK, kept.tails_NT)
    logprobs_NK, tail_N = signal.at(temperature)
    softened_NV = torch.log_softmax((hidden_NH @ head_VH.T).double() / temperature, -1)
    expected_NK = softened_NV.gather(1, kept.ids_NK)
    rest_N = softened_NV.scatter(1, kept.ids_NK, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(logprobs_NK.double(), expected_NK, rtol=0, atol=1e-5)
    torch.testing.assert_close(tail_N.double(), rest_N, rtol=0, atol=1e-5)
    total_N = logprobs_NK.exp().sum(-1) + tail_N.exp()
    torch.testing.assert_close(total_N, torch.ones(N), rtol=0, atol=1e-6)


def test_a_position_without_a_distribution_stays_one():
    unused_NK, nan_NT = torch.full((1, 4), -torch.inf), torch.full((1, 3), torch.nan)
    for dense in (False, True):
        signal = TopKSignal(torch.zeros(1, 4, dtype=torch.long), unused_NK, nan_NT, dense)
        logprobs_NK, tail_N = signal.at(2.0)
        assert (logprobs_NK == -torch.inf).all()
        assert tail_N.isnan().all()


def test_a_temperature_without_a_tail_is_refused_unless_nothing_is_left():
    kept = top_k(*problem(), V)
    given = kept.ids_NK, kept.logprobs_NK, kept.tails_NT
    with pytest.raises(ValueError, match=r"temperatures 1, 2, 4, not at 1\.5"):
        TopKSignal(*given).at(1.5)
    logprobs_NK, tail_N = TopKSignal(*given, dense=True).at(1.5)
    torch.testing.assert_close(logprobs_NK, torch.log_softmax(kept.logprobs_NK / 1.5, -1))
    assert (tail_N == -torch.inf).all()
