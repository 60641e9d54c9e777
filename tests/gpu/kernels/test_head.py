import math
from dataclasses import replace

import pytest
import torch

from nexus_cli.core.distill.head import head_loss
from nexus_cli.core.distill.teacher import DenseSignal
from nexus_cli.core.distill.topk import nucleus, tail_samples, top_k
from nexus_cli.core.kernels.head_loss import Kept, head_loss_chunk, head_loss_chunk_torch
from nexus_cli.core.kernels.head_top_k import (
    TAIL_TEMPERATURES,
    top_k_of_logits,
    top_k_of_logits_torch,
)

# Shape letters: C positions, V vocabulary, K kept entries, T temperatures of the tails.

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1, 1000), (3, 8192 + 37), (130, 20_480), (5, 23), (2, 201_088)]


def problem(rows, vocabulary, kind, temperature, k=17):
    torch.manual_seed(0)
    logits_CV = 3 * torch.randn(rows, vocabulary, device="cuda")
    teacher_CV = logits_CV + torch.randn_like(logits_CV)
    labels_C = torch.randint(vocabulary, (rows,), device="cuda")
    weights = torch.rand(2, rows, device="cuda").unbind()
    if kind == "none":
        return logits_CV, labels_C, *weights, None
    if kind == "dense":
        return logits_CV, labels_C, *weights, teacher_CV
    logp_CV = torch.log_softmax(teacher_CV.double() / temperature, -1)
    logprobs_CK, ids_CK = logp_CV.topk(k)
    logprobs_CK[::2, 3:] = -torch.inf  # unused: these tokens belong to the tail
    ids_CK[::2, 3:] = 0
    tail_C = (1 - logprobs_CK.exp().sum(-1)).log()
    labels_C[0] = ids_CK[0, 1]
    return logits_CV, labels_C, *weights, Kept(ids_CK, logprobs_CK.float(), tail_C.float())


def widened(value):
    if isinstance(value, Kept):
        return Kept(value.ids_CK, value.logprobs_CK.double(), value.tail_C.double())
    return value.double() if value is not None and value.is_floating_point() else value


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["none", "dense", "kept"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_loss_and_gradient_are_those_of_float64(shape, kind, temperature):
    given = problem(*shape, kind, temperature)
    exact_CV = torch.empty(shape, dtype=torch.float64, device="cuda")
    plain_CV = torch.empty(shape, device="cuda")
    exact = head_loss_chunk_torch(*map(widened, given), exact_CV, temperature, True)
    plain = head_loss_chunk_torch(*given, plain_CV, temperature, True)
    out_CV = torch.full(shape, torch.nan, device="cuda")
    again_CV = torch.full_like(out_CV, torch.nan)
    first, *rest = given
    twice = [
        head_loss_chunk(first.clone(), *rest, out, temperature=temperature, metrics=True)
        for out in (out_CV, again_CV)
    ]
    assert torch.equal(*twice)
    assert torch.equal(out_CV, again_CV)
    for part in range(3):
        error, plain_error = ((x[part] - exact[part]).abs().max() for x in (twice[0], plain))
        assert error <= 1.2 * plain_error + 5e-6
    assert torch.equal(twice[0][3].double(), exact[3])
    error, plain_error = ((x - exact_CV).abs().max() for x in (out_CV, plain_CV))
    assert error <= 1.2 * plain_error + 2e-7


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("size", [(7, 64, 1003), (300, 256, 50_000)])
def test_a_student_equal_to_its_teacher_has_kl_and_gradient_of_exactly_zero(temperature, size):
    rows, width, vocabulary = size
    torch.manual_seed(0)
    hidden_NH = torch.randn(rows, width, device="cuda").bfloat16().requires_grad_()
    head_VH = (torch.randn(vocabulary, width, device="cuda") / 4).bfloat16()
    kd_N = torch.rand(rows, device="cuda")
    labels_N = torch.zeros(rows, dtype=torch.long, device="cuda")
    teacher = DenseSignal(hidden_NH.detach().clone())
    loss = head_loss(
        hidden_NH, head_VH, labels_N, torch.zeros_like(kd_N), kd_N, teacher,
        temperature=temperature, chunk_size=128, metrics=True,
    )  # fmt: skip
    loss.total.backward()
    assert loss.total.item() == 0
    assert loss.kd_N.abs().max() == 0
    assert hidden_NH.grad.abs().max() == 0
    assert loss.agreement_N.min() == 1


def test_a_vanishing_tail_keeps_its_loss_and_gradient():
    logits_CV = torch.tensor([[200.0, 0, 0, 0]], device="cuda")
    ids_CK = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    kept = Kept(ids_CK, logits_CV.new_tensor([[0.25]]).log(), logits_CV.new_tensor([0.75]).log())
    one_C, out_CV = logits_CV.new_ones(1), torch.empty_like(logits_CV)
    parts_4C = head_loss_chunk(logits_CV, ids_CK[0], one_C, one_C, kept, out_CV)
    assert parts_4C[1].item() == pytest.approx(148.6137, rel=1e-5)
    assert out_CV[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25], abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 5, 23, 32, 64, 65])
@pytest.mark.parametrize("kind", ["normal", "ties", "negative"])
def test_the_top_k_is_that_of_a_sort(shape, k, kind):
    if k > shape[1]:
        pytest.skip("more than the vocabulary")
    torch.manual_seed(0)
    logits_CV = 5 * torch.randn(shape, device="cuda")
    if kind == "ties":
        logits_CV = logits_CV.round()
    if kind == "negative":
        logits_CV = -logits_CV.abs() - 3
    labels_C = torch.randint(shape[1], shape[:1], device="cuda")
    kept = top_k_of_logits(logits_CV, labels_C, k)
    again = top_k_of_logits(logits_CV, labels_C, k)
    ids_CK = kept[0]
    assert kept[2].shape == (shape[0], len(TAIL_TEMPERATURES))
    assert all(map(torch.equal, kept, again))
    best_CV, order_CV = torch.sort(logits_CV, dim=-1, descending=True, stable=True)
    assert torch.equal(logits_CV.gather(1, ids_CK), best_CV[:, :k])
    if k <= 64:
        assert torch.equal(ids_CK, order_CV[:, :k])
    exact = top_k_of_logits_torch(logits_CV.double(), labels_C, k)
    for ours, theirs in zip(kept[1:], exact[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-5)


def test_a_tail_too_small_for_float32_is_still_there():
    logits_CV = torch.zeros(2, 3000, device="cuda")
    logits_CV[:, 2000] = 300
    labels_C = torch.zeros(2, dtype=torch.long, device="cuda")
    _, _, tails_CT, nll_C = top_k_of_logits(logits_CV, labels_C, 1)
    expected = [math.log(2999) - 300 / temperature for temperature in TAIL_TEMPERATURES]
    for tails_T in tails_CT.tolist():
        assert tails_T == pytest.approx(expected, rel=1e-6)
    assert nll_C.tolist() == [300.0, 300.0]


def test_hidden_states_give_the_top_k_of_their_logits():
    torch.manual_seed(0)
    hidden_NH = torch.randn(50, 64, device="cuda").bfloat16()
    head_VH = torch.randn(9000, 64, device="cuda").bfloat16()
    labels_N = torch.randint(9000, (50,), device="cuda")
    ours = top_k(hidden_NH, head_VH, labels_N, 32, chunk_size=16)
    exact = top_k(hidden_NH.double(), head_VH.double(), labels_N, 32)
    torch.testing.assert_close(ours.logprobs_NK, exact.logprobs_NK, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.tails_NT, exact.tails_NT, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.nll_N, exact.nll_N, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_nucleus_and_the_samples_do_not_wait_and_agree_with_a_cpu():
    torch.manual_seed(0)
    hidden_NH = torch.randn(300, 64, device="cuda").bfloat16()
    head_VH = (torch.randn(9001, 64, device="cuda") / 2).bfloat16()
    labels_N = torch.zeros(300, dtype=torch.long, device="cuda")
    whole = top_k(hidden_NH, head_VH, labels_N, 32, chunk_size=128)
    drawn = []
    for _ in range(2):
        generator = torch.Generator("cuda").manual_seed(3)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            kept = top_k(
                hidden_NH, head_VH, labels_N, 32, chunk_size=128, top_p=0.6, min_k=2,
                num_tail_samples=16, generator=generator,
            )  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
        drawn.append(kept.tail_samples_Nm)
    assert torch.equal(*drawn)
    on_cpu = nucleus(
        replace(whole, logprobs_NK=whole.logprobs_NK.cpu(), tails_NT=whole.tails_NT.cpu()), 0.6, 2
    )
    used_NK = kept.logprobs_NK > -torch.inf
    assert 2 <= used_NK.sum(-1).min() < used_NK.sum(-1).max()
    assert torch.equal(used_NK.cpu(), on_cpu.logprobs_NK > -torch.inf)
    torch.testing.assert_close(kept.tails_NT.cpu(), on_cpu.tails_NT, rtol=0, atol=1e-5)
    total_N = kept.logprobs_NK.exp().sum(-1) + kept.tails_NT[:, 0].exp()
    torch.testing.assert_close(total_N, torch.ones_like(total_N), rtol=0, atol=3e-6)
    named_NmK = kept.tail_samples_Nm[..., None] == kept.ids_NK[:, None]
    assert not (named_NmK & used_NK[:, None]).any()


def test_samples_follow_the_tail():
    torch.manual_seed(0)
    logits_V = torch.randn(2000, device="cuda")
    ids_K = logits_V.topk(5).indices
    p_V = torch.softmax(logits_V.double().index_fill(0, ids_K, -torch.inf), 0)
    generator = torch.Generator("cuda").manual_seed(0)
    rows, draws = 500, 400
    drawn_Cm = tail_samples(logits_V.repeat(rows, 1), ids_K.expand(rows, -1), draws, generator)
    counts_V = torch.bincount(drawn_Cm.flatten(), minlength=len(p_V))
    assert counts_V[ids_K].sum() == 0
    held_V = p_V > 0
    expected_X = p_V[held_V] * rows * draws
    statistic = ((counts_V[held_V] - expected_X) ** 2 / expected_X).sum().item()
    freedom = int(held_V.sum()) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)
