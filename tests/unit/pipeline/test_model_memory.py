"""What the engine would take of a GPU, by a model's files alone; none is needed to count."""

import pytest
import torch

from nexus_cli.core.model.gpt_oss.engine.layer import FrozenLayer
from nexus_cli.core.model.gpt_oss.loading import load_model, runs_engine
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4
from nexus_cli.pipeline.capacity import forward_bytes
from nexus_cli.pipeline.model_memory import EngineOnDisk, Placement

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FEW, MANY = 8, 16_384  # tokens on either side of the backends' crossover


def test_the_engine_runs_in_bf16_on_a_gpu_alone():
    assert runs_engine(GPU, torch.bfloat16)
    assert not runs_engine(GPU, torch.float32)
    assert not runs_engine(CPU, torch.bfloat16)


@pytest.mark.parametrize("place", [Placement(CPU, torch.bfloat16), Placement(GPU, torch.float32)])
def test_without_the_engine_the_sums_are_those_of_the_plain_model(tiny_model_dir, place):
    plain = forward_bytes(tiny_model_dir, 2, 512, place.dtype)
    assert place.forward_bytes(tiny_model_dir, 2, 512) == plain
    assert place.buffer_bytes(tiny_model_dir, MANY) == 0


def test_the_engine_holds_no_scores(tiny_model_dir):
    place = Placement(GPU, torch.bfloat16, "fused")
    one, four = (place.forward_bytes(tiny_model_dir, 2, n) for n in (1024, 4096))
    assert four == 4 * one
    assert four < forward_bytes(tiny_model_dir, 2, 4096, torch.bfloat16) / 10


def test_the_decoding_buffer_holds_a_layers_larger_matrix(tiny_model_dir):
    experts = load_model(tiny_model_dir).model.layers[0].mlp.experts
    decoded = decoded_bytes(experts, "gate_up_proj")
    for backend, few, many in (("fused", 0, 0), ("dequant", 1, 1), ("auto", 0, 1), ("bf16", 0, 0)):
        engine = EngineOnDisk(tiny_model_dir, backend)
        assert engine.buffer_bytes(FEW) == few * decoded
        assert engine.buffer_bytes(MANY) == many * decoded


def test_experts_decoded_at_load_are_counted_so(tiny_converted_dir):
    model = load_model(tiny_converted_dir, dtype=torch.bfloat16)
    decoded = packed = 0
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            decoded += decoded_bytes(layer.mlp.experts, name)
            packed += getattr(layer.mlp.experts, f"{name}_blocks").nbytes
            packed += getattr(layer.mlp.experts, f"{name}_scales").nbytes
    as_stored, ahead = (
        Placement(GPU, torch.bfloat16, backend).weight_bytes(tiny_converted_dir)
        for backend in ("auto", "bf16")
    )
    assert ahead - as_stored == decoded - packed


def test_an_engine_on_disk_plans_and_decodes_nothing(tiny_converted_dir):
    engine = EngineOnDisk(tiny_converted_dir, "auto")
    plan = engine.plan_training(tokens=MANY, budget_bytes=2**40)
    assert plan.activations.decoded_layers == len(engine.kept)
    assert not any(isinstance(layer, FrozenLayer) for layer in engine._layers)


def decoded_bytes(experts, name):
    blocks, scales = (getattr(experts, f"{name}_{part}") for part in ("blocks", "scales"))
    return dequantize_mxfp4(blocks, scales).nbytes
