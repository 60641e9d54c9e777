"""What a dry run says of a GPU's memory is what the run then does; no GPU is needed to count."""

import logging

import pytest
import torch

from nexus_cli.errors import ResourceError
from nexus_cli.io import tensor_files
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.model_memory import EngineOnDisk, Placement
from nexus_cli.pipeline.training import memory, plan
from nexus_cli.pipeline.training.request import online_request

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def make_request(make_config, tmp_path):
    def make(**changes):
        return online_request(make_config(**changes), Workspace(tmp_path), 1)

    return make


def plan_of(request, free, *, teacher_beside=True):
    tensors = tensor_files.tensors(request.student.path)
    sizes = plan.trained_sizes(tensors, train_router=False)
    return plan.plan_engine(request, tensors, sizes, GPU, free, teacher_beside=teacher_beside)


def least(request):
    """Bytes with which the layers' inputs fit, and nothing else."""
    held, _ = plan_of(request, 2**40)
    engine = EngineOnDisk(request.student.path, request.config.runtime.experts_backend)
    positions = request.batch_size * request.seq_len
    inputs = len(engine.kept) * engine.layer_bytes.input * positions
    peaks = 2 * engine.transient_bytes(positions)  # and the teacher's, in its graph
    return held.weights + held.training + held.head + peaks + memory.SPARE + inputs


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("extra", [0, 40_000, 2**30])
def test_a_dry_run_plans_as_the_run_does(make_request, kind, extra, monkeypatch, caplog):
    request = make_request(optimizer={"kind": kind})
    free = least(request) + extra
    held, lines = plan_of(request, free)

    tensors = tensor_files.tensors(request.student.path)
    dtype = torch.bfloat16 if kind == "adamw-8bit" else torch.float32
    masters = {
        str(number): torch.empty(size, dtype=dtype if size >= 4096 else torch.float32)
        for number, size in enumerate(plan.trained_sizes(tensors, train_router=False))
    }
    loaded = held.weights + sum(master.nbytes for master in masters.values())
    monkeypatch.setattr(memory, "available", lambda _device, _limit: free - loaded)
    engine = EngineOnDisk(request.student.path, "auto")
    with caplog.at_level(logging.INFO, logger="nexus_cli"):
        memory.spend_memory(engine, request, masters, GPU)
    assert [record.getMessage() for record in caplog.records] == lines
    assert held.total <= free


def test_less_than_the_inputs_take_is_refused(make_request):
    request = make_request()
    plan_of(request, least(request))
    with pytest.raises(ResourceError, match="a batch of 64 tokens does not fit on cuda:0"):
        plan_of(request, least(request) - 1)


def test_more_memory_keeps_more(make_request):
    request = make_request()
    kept = [plan_of(request, least(request) + extra)[0].activations for extra in (0, 40_000, 2**30)]
    assert kept == sorted(set(kept))


def test_recomputation_keeps_the_inputs(make_request):
    request = make_request(runtime={"gradient_checkpointing": True})
    held, lines = plan_of(request, 2**40)
    engine = EngineOnDisk(request.student.path, "auto")
    assert held.activations == len(engine.kept) * engine.layer_bytes.input * 64
    assert "attention 0, qkv 0, gate_up 0, shared 0" in lines[1]


def test_a_teacher_on_the_same_gpu_is_counted(make_request, tiny_model_dir):
    request = make_request(teacher={"model": str(tiny_model_dir)})
    beside, apart = (plan_of(request, 2**40, teacher_beside=there)[0] for there in (True, False))
    assert apart.teacher == 0
    assert beside.teacher == Placement(GPU, torch.bfloat16).weight_bytes(tiny_model_dir)


def test_the_plan_is_printed(make_request, tmp_path, monkeypatch, capsys):
    asked = []

    def available(device, limit):
        asked.append((device, limit))
        return 2**40

    monkeypatch.setattr(plan, "available", available)
    request = make_request(runtime={"memory_gib": 40})
    plan.describe(request, tmp_path, GPU, OTHER)
    shown = " ".join(capsys.readouterr().out.split())
    assert asked == [(GPU, 40)]
    for text in ("activations kept, of", "attention", "experts kept decoded", "set aside", "fused"):
        assert text in shown
    assert "(estimate)" not in shown


def test_recomputation_that_does_not_fit_is_refused(make_request, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "available", lambda _device, _limit: 2**20)
    request = make_request(runtime={"gradient_checkpointing": True})
    with pytest.raises(ResourceError, match="needs about"):
        plan.describe(request, tmp_path, GPU, GPU)
