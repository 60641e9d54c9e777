"""The vocabulary head at GPT-OSS's size: chunked loss, and top-32 with log-sum-exp.

python benchmarks/gpu/head.py [--tokens 16384] [--json]

Each is timed beside its PyTorch form and beside its products alone, in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from machine import print_machine
from torch import Tensor

from nexus_cli.core.distill.head import HeadLoss, head_loss
from nexus_cli.core.distill.projection import project
from nexus_cli.core.distill.teacher import DenseSignal, TeacherSignal, TopKSignal
from nexus_cli.core.distill.topk import top_k

VOCABULARY, HIDDEN, K = 201_088, 2880, 32
LOGIT_STD = 4.0  # an entropy of a few nats
LOSS_CHUNKS = (256, 512, 1024, 2048)
TOP_K_CHUNKS = (512, 1024, 2048, 4096)


class Measured(dict[str, float]):
    """Milliseconds (median of a few) and peak memory above what was there, in MiB."""


def measure(work: Callable[[], object], repeats: int = 3) -> Measured:
    """Time ``work`` after one run that compiles and fills the allocator."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    peak = torch.cuda.max_memory_allocated() - before
    return Measured(ms=round(statistics.median(times), 2), peak_mib=round(peak / 2**20))


@contextmanager
def pytorch_form() -> Iterator[None]:
    """Send a bfloat16 head on a GPU to the PyTorch form of the loss."""
    package = "nexus_cli.core.distill"
    with (
        mock.patch(f"{package}.head.takes_kernels", return_value=False),
        mock.patch(f"{package}.kernel_chunks.takes_kernels", return_value=False),
    ):
        yield


def loss_of(
    hidden: Tensor, head: Tensor, signal: TeacherSignal | None, chunk: int
) -> tuple[HeadLoss, Tensor]:
    """The loss and its gradient, cross entropy and KL weighted alike."""
    tokens = len(hidden)
    weight = torch.full((tokens,), 1 / tokens, device="cuda")
    kd_weight = weight if signal is not None else torch.zeros_like(weight)
    labels = (torch.arange(tokens, device="cuda") * 12_345) % VOCABULARY
    leaf = hidden.detach().requires_grad_()
    loss = head_loss(leaf, head, labels, weight, kd_weight, signal, chunk_size=chunk)
    (gradient,) = torch.autograd.grad(loss.total, leaf)
    return loss, gradient


def products(
    hidden: Tensor, head: Tensor, chunk: int, forward: int, dlogits: Tensor | None = None
) -> None:
    """The products of a chunked head alone: ``forward`` to logits, and one from ``dlogits``."""
    logits = torch.empty(chunk, VOCABULARY, device="cuda")
    for start in range(0, len(hidden), chunk):
        part = hidden[start : start + chunk]
        for _ in range(forward):
            project(part, head, logits[: len(part)])
        if dlogits is not None:
            torch.mm(dlogits[: len(part)], head, out_dtype=torch.float32)


def bench_loss(hidden: Tensor, head: Tensor, signal: TeacherSignal | None) -> dict[str, object]:
    """Ours, the PyTorch form and the products alone, by chunk size; and how far they differ."""
    forward = 2 if isinstance(signal, DenseSignal) else 1
    result: dict[str, object] = {}
    for chunk in LOSS_CHUNKS:
        # Random, as zeros take less power and so run faster than a gradient does.
        dlogits = torch.randn(chunk, VOCABULARY, device="cuda", dtype=torch.bfloat16)
        alone = measure(lambda c=chunk, d=dlogits: products(hidden, head, c, forward, d))
        del dlogits
        row = {
            "products": alone,
            "ours": measure(lambda c=chunk: loss_of(hidden, head, signal, c)),
        }
        with pytorch_form():
            row["pytorch"] = measure(lambda c=chunk: loss_of(hidden, head, signal, c), 2)
        result[f"chunk_{chunk}"] = row
    ours, gradient = loss_of(hidden, head, signal, LOSS_CHUNKS[0])
    with pytorch_form():
        theirs, expected = loss_of(hidden, head, signal, LOSS_CHUNKS[0])
    apart = (gradient.float() - expected.float()).norm() / expected.float().norm()
    result["value"] = ours.total.item()
    result["value_difference"] = (ours.total - theirs.total).abs().item()
    result["ce_difference_max"] = (ours.ce_N - theirs.ce_N).abs().max().item()
    result["kd_difference_max"] = (ours.kd_N - theirs.kd_N).abs().max().item()
    result["gradient_relative_difference"] = apart.item()
    return result


def plain_top_k(hidden: Tensor, head: Tensor, chunk: int) -> None:
    """Top K and log-sum-exp by PyTorch's own operations on float32 logits."""
    logits = torch.empty(chunk, VOCABULARY, device="cuda")
    for start in range(0, len(hidden), chunk):
        part = hidden[start : start + chunk]
        filled = project(part, head, logits[: len(part)])
        filled.topk(K)
        filled.logsumexp(-1)


def sampled_top_k(hidden: Tensor, head: Tensor, labels: Tensor, chunk: int) -> None:
    """Ours with a nucleus, and draws from the tail."""
    top_k(hidden, head, labels, K, chunk_size=chunk, top_p=0.98, min_k=4, num_tail_samples=8)


def bench_top_k(hidden: Tensor, head: Tensor) -> dict[str, object]:
    """Ours, PyTorch's and the product alone, by chunk size; and whether ours is exact."""
    labels = torch.zeros(len(hidden), dtype=torch.long, device="cuda")
    result: dict[str, object] = {}
    for chunk in TOP_K_CHUNKS:
        result[f"chunk_{chunk}"] = {
            "products": measure(lambda c=chunk: products(hidden, head, c, 1)),
            "ours": measure(lambda c=chunk: top_k(hidden, head, labels, K, chunk_size=c)),
            "sampled": measure(lambda c=chunk: sampled_top_k(hidden, head, labels, c)),
            "pytorch": measure(lambda c=chunk: plain_top_k(hidden, head, c), 1),
        }
    rows = min(1024, len(hidden))
    logits = project(hidden[:rows], head)
    ours = top_k(hidden[:rows], head, labels[:rows], K, chunk_size=rows)
    values, ids = logits.topk(K)
    log_sum = logits.double().logsumexp(-1)
    exact = values.double() - log_sum[:, None]
    tied = logits.gather(1, ours.ids_NK) == values
    result["ids_equal"] = (ours.ids_NK == ids).double().mean().item()
    result["ids_equal_or_tied"] = tied.double().mean().item()
    result["logprob_difference_max"] = (ours.logprobs_NK - exact).abs().max().item()
    return result


def problem(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of student and teacher, and a head, in bfloat16."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device="cuda")
    teacher = hidden + 0.1 * torch.randn_like(hidden)
    head = torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16)
    head.mul_(LOGIT_STD / HIDDEN**0.5)
    return hidden.bfloat16(), teacher.bfloat16(), head


def show(name: str, result: dict[str, object]) -> None:
    """One line a chunk size, then the differences."""
    print(name)
    for key, value in result.items():
        if isinstance(value, dict):
            parts = (
                f"{who} {m['ms']:7.1f} ms {m['peak_mib']:6.0f} MiB" for who, m in value.items()
            )
            print(f"  {key:12}", "   ".join(parts))
        else:
            print(f"  {key:30} {value:.3g}")


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    hidden, teacher, head = problem(args.tokens)
    labels = torch.zeros(args.tokens, dtype=torch.long, device="cuda")
    kept = top_k(teacher, head, labels, K)
    signals = {
        "loss_ce": None,
        "loss_ce_dense_kd": DenseSignal(teacher),
        "loss_ce_store_kd": TopKSignal(kept.ids_NK, kept.logprobs_NK, kept.tails_NT),
    }
    result: dict[str, object] = {
        **print_machine(),
        "tokens": args.tokens,
    }
    entropy = torch.distributions.Categorical(logits=project(hidden[:64], head)).entropy()
    result["entropy"] = entropy.mean().item()
    for name, signal in signals.items():
        result[name] = bench_loss(hidden, head, signal)
        show(name, result[name])
    result["top_k"] = bench_top_k(hidden, head)
    show("top_k", result["top_k"])
    result["seconds"] = round(time.perf_counter() - began, 1)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
