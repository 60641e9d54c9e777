"""A run that does not fit is told what would, by the sums that plan runs."""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import replace

import pytest
import torch

from nexus_cli.cli import training_options
from nexus_cli.errors import ResourceError
from nexus_cli.io import tensor_files
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import out_of_memory
from nexus_cli.pipeline.out_of_memory import Held, Shortage
from nexus_cli.pipeline.training import fitting, plan, shortage
from nexus_cli.pipeline.training.request import online_request

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
GIB = 2**30
FULL = "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 80.00 GiB"


@pytest.fixture
def make_request(make_config, tmp_path):
    def make(**changes):
        data = {"seq_len": 1024}
        return online_request(make_config(**{"data": data, **changes}), Workspace(tmp_path), 1)

    return make


def least(request, device=GPU):
    tensors = tensor_files.tensors(request.student.path)
    sizes = plan.trained_sizes(tensors, train_router=False)
    return plan.least_memory(request, tensors, sizes, device, teacher_beside=True)


def plan_of(request, free):
    tensors = tensor_files.tensors(request.student.path)
    sizes = plan.trained_sizes(tensors, train_router=False)
    return plan.plan_engine(request, tensors, sizes, GPU, free, teacher_beside=True)


@pytest.mark.parametrize("backend", ["auto", "dequant", "fused", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"optimizer": {"kind": "adamw-8bit"}}])
def test_the_least_is_what_the_plan_can_just_do_with(make_request, backend, changes):
    request = make_request(batch_size=4, runtime={"experts_backend": backend}, **changes)
    plan_of(request, least(request))
    with pytest.raises(ResourceError, match="does not fit"):
        plan_of(request, least(request) - 1)


def test_the_least_of_recomputation_is_all_that_it_takes(make_request):
    request = make_request(runtime={"gradient_checkpointing": True})
    assert least(request) == plan_of(request, 2**40)[0].total


def test_without_the_engine_the_least_is_the_estimate(make_request):
    request = make_request()
    tensors = tensor_files.tensors(request.student.path)
    sizes = plan.trained_sizes(tensors, train_router=False)
    assert least(request, CPU) == plan.estimate_memory(request, tensors, sizes, CPU).total


def flags_of(hint):
    """Every alternative of a hint, as words of a command line, and the GiB that it names."""
    listed = hint.partition(": ")[2].split("; or ")
    found = [re.fullmatch(r"(.+) \(([\d.]+) GiB\)", one) for one in listed]
    return [(shlex.split(one[1]), float(one[2])) for one in found]


def test_each_change_is_enough_by_itself_and_is_typed_as_told(make_request):
    request = make_request(batch_size=8)
    room = least(request, CPU) - 1
    hint = fitting.what_fits(request, lambda r: least(r, CPU), room)
    listed = flags_of(hint)
    assert [words[:2] for words, _ in listed] == [
        ["--batch-size", "4"],
        ["--set", "data.seq_len=512"],
        ["--set", "runtime.gradient_checkpointing=true"],
    ]  # and not the optimizer: the tiny model has no tensor that it would split
    for words, gib in listed:
        assert gib <= room / GIB + 0.005
        given = dict(zip(words[::2], words[1::2], strict=True))
        config = training_options.resolve_training(
            None,
            [given["--set"]] if "--set" in given else [],
            {
                "batch_size": given.get("--batch-size"),
                "gradient_accumulation_steps": given.get("--gradient-accumulation-steps"),
                "optimizer": {"kind": given.get("--optimizer")},
            },
            freeze_router=False,
            train_router=False,
            train_router_bias=False,
            advanced=False,
        )
        assert config  # accepted as typed


def test_a_smaller_batch_keeps_the_sequences_of_a_step(make_request):
    request = make_request(batch_size=6, gradient_accumulation_steps=2)
    hint = fitting.what_fits(request, lambda r: r.batch_size, 2)
    assert hint.endswith("--batch-size 2 --gradient-accumulation-steps 6 (0.00 GiB)")
    split = make_request(batch_size=6, optimizer={"kind": "adamw-8bit"})
    ranks = replace(split, world_size=2)  # where sums of several passes are refused
    hint = fitting.what_fits(ranks, lambda r: r.batch_size, 2)
    assert hint.endswith("--batch-size 2 (0.00 GiB)")


def test_changes_that_are_enough_only_together_are_told_so(make_request):
    request = make_request(batch_size=2)

    def need(changed):
        halves = (changed.batch_size == 1, changed.seq_len <= 256)
        return 8 - sum(halves) - (changed.config.optimizer.kind == "adamw-8bit")

    assert fitting.what_fits(request, need, 5) == (
        "would fit in 0.00 GiB, all together: --optimizer adamw-8bit --batch-size 1 "
        "--gradient-accumulation-steps 2 --set data.seq_len=256 (0.00 GiB)"
    )
    hint = fitting.what_fits(request, lambda r: GIB * need(r), 4 * GIB)
    assert hint == (
        "no smaller batch, shorter sequences, recomputation or 8-bit optimizer would fit in "
        "4.00 GiB: the least is 5.00 GiB; use a device with more memory"
    )


def test_weights_that_do_not_fit_are_not_blamed_on_the_batch(make_request, tiny_model_dir):
    request = make_request(
        teacher={"model": str(tiny_model_dir)}, runtime={"experts_backend": "bf16"}
    )
    with pytest.raises(ResourceError) as caught:
        plan_of(request, 1000)
    assert caught.value.hint == (
        "the frozen weights alone take more than there is: use a device "
        "with more memory, or another --teacher-device, or --experts-backend auto"
    )


def test_a_plan_that_does_not_fit_lists_what_does(make_request):
    request = make_request(batch_size=4)
    with pytest.raises(ResourceError) as caught:
        plan_of(request, least(request) - 1)
    assert "--batch-size 2 --gradient-accumulation-steps 2 (" in caught.value.hint
    assert "--set data.seq_len=512 (" in caught.value.hint
    assert " GiB beside the frozen weights: " in caught.value.hint


def test_a_dry_run_that_does_not_fit_lists_what_does(make_request, tmp_path, monkeypatch):
    request = make_request(batch_size=4)
    monkeypatch.setattr(plan, "free_memory", lambda _: least(request, CPU) - 1)
    with pytest.raises(ResourceError, match="the run needs about") as caught:
        plan.describe(request, tmp_path, CPU, CPU)
    assert "--batch-size 2 --gradient-accumulation-steps 2 (" in caught.value.hint


def test_out_of_memory_in_a_step_is_told_what_would_fit(run, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError(FULL.partition(" GPU")[0])

    monkeypatch.setattr("nexus_cli.core.train.step.DistillationStep.forward", fail)
    with pytest.raises(ResourceError) as caught:
        run(batch_size=2)
    assert str(caught.value).startswith("out of memory on cpu in step 1: 3.00 GiB were asked for; ")
    assert "this process holds" in str(caught.value)
    assert "--batch-size 1 --gradient-accumulation-steps 2 (" in caught.value.hint
    assert "runtime.gradient_checkpointing=true (" in caught.value.hint
    assert "--optimizer adamw-8bit (" in caught.value.hint


def test_out_of_memory_while_loading_is_told_with_its_numbers(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 1073741824 bytes. Error code 12"
        )

    monkeypatch.setattr("nexus_cli.pipeline.training.assemble.load_model", fail)
    with pytest.raises(ResourceError, match=r"on cpu while loading: 1\.00 GiB were"):
        run()


def test_what_the_estimate_missed_is_counted_against_every_change(make_request):
    """The process held more than the sums say, so what just fits by the sums does not."""
    request = make_request(batch_size=4)
    held = Held(used=2 * GIB, reserved=2 * GIB, free=0, total=2 * GIB)
    exact = Shortage(CPU, 0, replace(held, used=least(request, CPU) - 1000))
    missed = Shortage(CPU, 2**40, held)
    hint = shortage.training_hint(request, CPU, CPU, exact, is_planned=True)
    assert hint.startswith("would fit in 2.00 GiB: --batch-size")
    hint = shortage.training_hint(request, CPU, CPU, missed, is_planned=True)
    assert hint.startswith("no smaller batch")


def test_the_engine_is_told_to_leave_room_for_what_was_missing(make_request):
    request = make_request(batch_size=4)
    held = Held(used=78 * GIB, reserved=79 * GIB, free=GIB, total=81 * GIB)
    hint = shortage.training_hint(request, GPU, GPU, Shortage(GPU, 3 * GIB, held), is_planned=True)
    assert hint.startswith("add --set runtime.memory_gib=76, so that less is kept, for which")
    assert "; or --optimizer adamw-8bit (" in hint
    bounded = make_request(batch_size=4, runtime={"memory_gib": 50})
    hint = shortage.training_hint(bounded, GPU, GPU, Shortage(GPU, 3 * GIB, held), is_planned=True)
    assert hint.startswith("add --set runtime.memory_gib=46, ")


def test_the_engine_is_told_to_do_less_where_leaving_room_is_not_enough(make_request):
    request = make_request(batch_size=64)
    need = least(request)
    held = Held(used=need, reserved=need, free=GIB, total=need + GIB)
    short = Shortage(GPU, 2**20, held)
    hint = shortage.training_hint(request, GPU, GPU, short, is_planned=True)
    assert re.match(r"add --set runtime.memory_gib=[\d.]+, .*, and make the run smaller: ", hint)
    assert "--batch-size 32 --gradient-accumulation-steps 2 (" in hint


def test_another_device_than_the_students_has_another_hint(make_request, tiny_model_dir):
    request = make_request(teacher={"model": str(tiny_model_dir)})
    short = Shortage(OTHER, None, None)
    hint = shortage.training_hint(request, GPU, OTHER, short, is_planned=True)
    assert "--teacher-device" in hint
    hint = shortage.training_hint(request, GPU, GPU, Shortage(CPU, 1, None), is_planned=False)
    assert hint == out_of_memory.HOST_HINT
    hint = shortage.training_hint(request, GPU, GPU, Shortage(GPU, 1, None), is_planned=False)
    assert hint == shortage.GENERAL


def test_a_hint_takes_no_time(make_request):
    request = make_request(batch_size=64)
    began = time.perf_counter()
    fitting.what_fits(request, least, least(request) - 1)
    fitting.what_fits(request, least, 1000)
    assert time.perf_counter() - began < 10
