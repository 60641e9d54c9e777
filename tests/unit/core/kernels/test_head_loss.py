import pytest
import torch

from nexus_cli.core.distill.head import head_loss
from nexus_cli.core.distill.teacher import TAIL_TEMPERATURES, DenseSignal, TopKSignal
from nexus_cli.core.kernels.head_loss import Kept, head_loss_chunk

# Shape letters: C positions, V vocabulary, K kept entries.

C, V, K = 7, 29, 5


def problem():
    generator = torch.Generator().manual_seed(0)
    logits_CV = 3 * torch.randn(C, V, generator=generator, dtype=torch.float64)
    teacher_CV = logits_CV + torch.randn(C, V, generator=generator, dtype=torch.float64)
    labels_C = torch.randint(V, (C,), generator=generator)
    ce_C = torch.rand(C, generator=generator, dtype=torch.float64)
    kd_C = torch.rand(C, generator=generator, dtype=torch.float64)
    return logits_CV, teacher_CV, labels_C, ce_C, kd_C


def kept_of(teacher_CV, temperature):
    logp_CV = torch.log_softmax(teacher_CV / temperature, -1)
    logprobs_CK, ids_CK = logp_CV.topk(K)
    logprobs_CK[::2, 3:] = -torch.inf  # unused: these tokens belong to the tail
    ids_CK[::2, 3:] = 0
    tail_C = (1 - logprobs_CK.exp().sum(-1)).log()
    return ids_CK, logprobs_CK, tail_C


def signal_of(teacher_CV):
    """The same entries as a signal, which is at temperature 1 with three tails."""
    ids_CK, logprobs_CK, _ = kept_of(teacher_CV, 1.0)
    sums = []
    for value in TAIL_TEMPERATURES:
        whole_C = (torch.log_softmax(teacher_CV, -1) / value).exp().sum(-1)
        sums.append((whole_C - (logprobs_CK / value).exp().sum(-1)).log())
    return TopKSignal(ids_CK, logprobs_CK, torch.stack(sums, -1))


@pytest.mark.parametrize("kind", ["none", "dense", "kept"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_definition_agrees_with_the_formulas_of_the_head(kind, temperature):
    logits_CV, teacher_CV, labels_C, ce_C, kd_C = problem()
    ids_CK, logprobs_CK, tail_C = kept_of(teacher_CV, temperature)
    teacher, signal = {
        "none": (None, None),
        "dense": (teacher_CV, DenseSignal(teacher_CV)),
        "kept": (Kept(ids_CK, logprobs_CK, tail_C), signal_of(teacher_CV)),
    }[kind]
    if teacher is None:
        kd_C = torch.zeros_like(kd_C)
    hidden_CV = logits_CV.clone().requires_grad_()  # with an identity for a head these are logits
    expected = head_loss(
        hidden_CV, torch.eye(V).double(), labels_C, ce_C, kd_C, signal,
        temperature=temperature, metrics=True,
    )  # fmt: skip
    expected.total.backward()

    out_CV = torch.full_like(logits_CV, torch.nan)
    parts_4C = head_loss_chunk(
        logits_CV, labels_C, ce_C, kd_C, teacher, out_CV, temperature=temperature, metrics=True
    )

    torch.testing.assert_close(out_CV, hidden_CV.grad)
    torch.testing.assert_close(parts_4C[0], expected.ce_N)
    torch.testing.assert_close(parts_4C[1], expected.kd_N)
    if teacher is not None:
        torch.testing.assert_close(parts_4C[2], expected.entropy_N)
        assert torch.equal(parts_4C[3], expected.agreement_N)


def test_tensors_that_do_not_fit_are_refused():
    logits_CV, teacher_CV, labels_C, ce_C, kd_C = problem()
    out_CV = torch.empty_like(logits_CV)
    given = (labels_C, ce_C, kd_C)
    with pytest.raises(ValueError, match="contiguous"):
        head_loss_chunk(logits_CV, *given, teacher_CV.T.contiguous().T, out_CV)
    with pytest.raises(ValueError, match="numbers of positions differ"):
        head_loss_chunk(logits_CV, labels_C[1:], ce_C, kd_C, None, out_CV)
    with pytest.raises(ValueError, match="teacher's logits differ"):
        head_loss_chunk(logits_CV, *given, teacher_CV[1:], out_CV)
    with pytest.raises(ValueError, match="another shape"):
        head_loss_chunk(logits_CV, *given, None, out_CV[1:])
    with pytest.raises(ValueError, match="float32 beside"):
        head_loss_chunk(logits_CV, labels_C, ce_C.float(), kd_C, None, out_CV)
    ids_CK, logprobs_CK, tail_C = kept_of(teacher_CV, 1.0)
    with pytest.raises(ValueError, match="another number"):
        head_loss_chunk(logits_CV, *given, Kept(ids_CK, logprobs_CK, tail_C[1:]), out_CV)
    with pytest.raises(ValueError, match="differ in shape"):
        head_loss_chunk(logits_CV, *given, Kept(ids_CK, logprobs_CK[:, 1:], tail_C), out_CV)
    meta = [t.to("meta") for t in (logits_CV, *given, out_CV)]
    with pytest.raises(ValueError, match="no kernel for meta"):
        head_loss_chunk(*meta[:4], None, meta[4])
