import math

import pytest
import torch

from nexus_cli.core.kernels.head_top_k import TAIL_TEMPERATURES, top_k_of_logits


@pytest.mark.parametrize("k", [1, 6, 50])
def test_it_keeps_the_largest_and_sums_the_others(k):
    generator = torch.Generator().manual_seed(0)
    logits_CV = 4 * torch.randn(3, 50, generator=generator, dtype=torch.float64)
    labels_C = torch.tensor([0, 7, 49])
    ids_CK, logprobs_CK, tails_CT, nll_C = top_k_of_logits(logits_CV, labels_C, k)
    p_CV = logits_CV.softmax(-1)
    order_CV = p_CV.argsort(-1, descending=True)
    assert torch.equal(ids_CK, order_CV[:, :k])
    torch.testing.assert_close(logprobs_CK.exp(), p_CV.gather(1, ids_CK))
    rest_CX = p_CV.gather(1, order_CV[:, k:])
    sums = [(rest_CX ** (1 / temperature)).sum(-1) for temperature in TAIL_TEMPERATURES]
    torch.testing.assert_close(tails_CT.exp(), torch.stack(sums, -1))
    torch.testing.assert_close(nll_C.neg().exp(), p_CV.gather(1, labels_C[:, None])[:, 0])


def test_logits_whose_log_probabilities_round_to_one_number_are_told_apart():
    logits_CV = torch.linspace(1, 1 + 2**-16, 129)[None].flip(1)
    logits_CV[0, ::2] -= 20
    labels_C = torch.zeros(1, dtype=torch.long)
    assert len(logits_CV.log_softmax(-1).unique()) < 100
    ids_CK, *_ = top_k_of_logits(logits_CV, labels_C, 64)
    assert ids_CK.tolist() == [list(range(1, 129, 2))]


def test_a_tail_whose_mass_float32_cannot_hold_is_still_there():
    logits_CV = torch.zeros(1, 3000)
    logits_CV[0, 2000] = 300
    _, _, tails_CT, _ = top_k_of_logits(logits_CV, torch.zeros(1, dtype=torch.long), 1)
    expected = [math.log(2999) - 300 / temperature for temperature in TAIL_TEMPERATURES]
    assert tails_CT[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_what_does_not_fit_is_refused():
    logits_CV, labels_C = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot keep 6 of 5"):
        top_k_of_logits(logits_CV, labels_C, 6)
    with pytest.raises(ValueError, match="labels must be int64"):
        top_k_of_logits(logits_CV, labels_C.int(), 2)
    with pytest.raises(ValueError, match="no kernel for meta"):
        top_k_of_logits(logits_CV.to("meta"), labels_C.to("meta"), 2)
