"""Out of memory, wherever it happens, is one sentence with its numbers and a hint."""

from __future__ import annotations

import errno

import pytest
import torch

from nexus_cli.errors import ResourceError
from nexus_cli.pipeline import out_of_memory
from nexus_cli.pipeline.out_of_memory import (
    Held,
    asked_bytes,
    held_on,
    is_out_of_memory,
    memory_on,
    shortage,
)

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.15 GiB of "
    "which 512.00 MiB is free. Including non-PyTorch memory, this process has 78.60 GiB memory in "
    "use. Of the allocated memory 77.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
HOST = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1099511627776 bytes. Error code 12 (Cannot allocate memory)"
)
WINDOWS = "DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (CUDA, int(2.5 * 2**30)),
        ("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 79.15 GiB total", 20 * 2**20),
        ("CUDA out of memory. Tried to allocate more than 1EB memory.", None),
        (HOST, 2**40),
        (WINDOWS, 4096),
        ("Unable to allocate 8.00 KiB for an array with shape (1024,)", 8192),
        ("CUDA error: out of memory", None),
        ("", None),
    ],
)
def test_what_was_asked_is_read_from_any_message(message, size):
    assert asked_bytes(message) == size


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        torch.OutOfMemoryError(),
        RuntimeError(HOST),
        RuntimeError(WINDOWS),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_kind_of_it_is_known(error):
    assert is_out_of_memory(error)
    with pytest.raises(ResourceError, match="out of memory on") as caught, memory_on(CPU, "rest"):
        raise error
    assert caught.value.hint
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
        RuntimeError("Triton Error: out of resource: shared memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError(HOST),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, memory_on(CPU, "rest"):
        raise error
    assert caught.value is error


def test_a_real_allocation_that_no_machine_has_is_told_with_its_size():
    with pytest.raises(ResourceError) as caught, memory_on(CPU, "a smaller batch"):
        torch.empty(2**56, dtype=torch.uint8)
    said = str(caught.value)
    assert said.startswith("out of memory on cpu: 67108864.00 GiB were asked for; ")
    assert "are free; this process holds" in said
    assert caught.value.hint == "a smaller batch"


def test_the_numbers_are_those_of_the_device_that_was_full(monkeypatch):
    asked = []

    def held(device):
        asked.append(device)
        return Held(used=75 * 2**30, reserved=77 * 2**30, free=2**29, total=79 * 2**30)

    monkeypatch.setattr(out_of_memory, "held_on", held)
    with (
        pytest.raises(ResourceError) as caught,
        memory_on(GPU, lambda short: f"of {short.device}", doing=lambda: "in step 3"),
    ):
        raise torch.OutOfMemoryError(CUDA)
    assert str(caught.value) == (
        "out of memory on cuda:1 in step 3: 2.50 GiB were asked for; 0.50 GiB of 79.00 GiB are "
        "free; this process holds 77.00 GiB, 75.00 GiB of it in tensors"
    )
    assert caught.value.hint == "of cuda:1"
    assert asked == [OTHER]


def test_a_full_host_beside_a_gpu_is_not_the_gpus_fault():
    with pytest.raises(ResourceError, match="on cpu") as caught, memory_on(GPU, "a smaller batch"):
        raise RuntimeError(HOST)
    assert caught.value.hint == out_of_memory.HOST_HINT


def test_a_device_that_does_not_answer_leaves_numbers_out(monkeypatch):
    def broken(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert held_on(GPU) is None
    short = shortage(RuntimeError("CUDA error: out of memory"), GPU)
    assert short.describe() == ""
    with pytest.raises(ResourceError) as caught, memory_on(GPU, "rest"):
        raise RuntimeError("CUDA error: out of memory")
    assert str(caught.value) == "out of memory on cuda:0"


def test_a_cpu_knows_what_it_holds():
    held = held_on(CPU)
    assert 0 < held.used == held.reserved < held.total
    assert 0 < held.free < held.total
    assert held.attainable == held.used + held.free
