"""Weights on a CUDA device are those on the CPU, bit for bit."""

import pytest
import torch

from nexus_cli import embedded
from nexus_cli.core.model.gpt_oss import streaming
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.errors import ArtifactError

pytestmark = pytest.mark.gpu


def bits(tensor):
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def assert_equal(gpu, cpu):
    for kind in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(model, kind)()) for model in (gpu, cpu))
        assert list(a) == list(b)
        for name, tensor in a.items():
            assert tensor.device.type == "cuda", name
            assert (tensor.dtype, tensor.requires_grad) == (b[name].dtype, False), name
            assert torch.equal(bits(tensor), bits(b[name])), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece", [4096, 10**6 // 64 * 64, streaming.PIECE])
def test_the_embedded_model(dtype, piece, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", piece)
    cpu = load_model(embedded.MODEL_DIR, dtype=dtype)
    assert_equal(load_model(embedded.MODEL_DIR, device="cuda", dtype=dtype), cpu)


def test_a_converted_model_and_its_gate(tiny_converted_dir):
    gpu = load_model(tiny_converted_dir, device="cuda:0")
    assert_equal(gpu, load_model(tiny_converted_dir))
    assert gpu.model.layers[0].mlp.shared_expert.output_gate.dtype == torch.float32


def test_memory_that_is_still_in_use_is_not_overwritten(monkeypatch):
    # The allocator may give the weights memory that queued work has yet to read.
    monkeypatch.setattr(streaming, "PIECE", 2**16)
    cpu = load_model(embedded.MODEL_DIR)
    size = 2**26
    source = torch.arange(size, device="cuda", dtype=torch.uint8)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    copy = source.clone()
    del source
    gpu = load_model(embedded.MODEL_DIR, device="cuda")
    assert_equal(gpu, cpu)
    assert torch.equal(copy.cpu(), torch.arange(size, dtype=torch.uint8))


def test_a_file_that_ends_too_early_is_an_error(tiny_model_dir, monkeypatch):
    original = streaming._pieces

    def further(*arguments):
        return [
            streaming._Piece(piece.shard, piece.begin + 2**30, piece.dtype, piece.target_N)
            for piece in original(*arguments)
        ]

    monkeypatch.setattr(streaming, "_pieces", further)
    with pytest.raises(ArtifactError, match="truncated"):
        load_model(tiny_model_dir, device="cuda")
