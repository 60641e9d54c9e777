import pytest
import torch

from nexus_cli.core.distill import head
from nexus_cli.core.distill.teacher import TAIL_TEMPERATURES, DenseSignal, TopKSignal

# Shape letters: N positions, H hidden size, V vocabulary.

N, H, V = 11, 6, 23


@pytest.mark.parametrize("kind", ["none", "dense", "top-k"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_reused_buffers_give_the_same_loss_and_gradient(monkeypatch, kind, temperature):
    torch.manual_seed(0)
    hidden_NH, teacher_NH, head_VH = (torch.randn(size, H) for size in (N, N, V))
    labels_N = torch.randint(V, (N,))
    ce_N, kd_N = torch.rand(2, N)
    ce_N[[0, 3, 4]] = 0
    kd_N[[0, 1, 5]] = 0
    logp_NV = torch.log_softmax(teacher_NH @ head_VH.T, -1)
    logprobs_NK, ids_NK = logp_NV.topk(4)
    rest_NV = logp_NV.scatter(1, ids_NK, -torch.inf)
    tails_NT = torch.stack([(rest_NV / value).logsumexp(-1) for value in TAIL_TEMPERATURES], -1)
    signal = {
        "none": None,
        "dense": DenseSignal(teacher_NH),
        "top-k": TopKSignal(ids_NK, logprobs_NK, tails_NT),
    }[kind]
    if signal is None:
        kd_N = torch.zeros(N)
    losses, gradients = [], []
    for takes in (False, True):
        monkeypatch.setattr(head, "takes_kernels", lambda _, takes=takes: takes)
        leaf_NH = hidden_NH.clone().requires_grad_()
        loss = head.head_loss(
            leaf_NH, head_VH, labels_N, ce_N, kd_N, signal,
            temperature=temperature, chunk_size=3, metrics=True,
        )  # fmt: skip
        loss.total.backward()
        losses.append(loss)
        gradients.append(leaf_NH.grad)
    torch.testing.assert_close(*gradients)
    for name in ("total", "ce_N", "kd_N", "entropy_N", "agreement_N"):
        plain, kernels = (getattr(loss, name) for loss in losses)
        if plain is not None:
            torch.testing.assert_close(kernels, plain)
