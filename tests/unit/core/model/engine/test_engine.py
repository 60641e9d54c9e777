"""How an engine spends a budget; no GPU is needed to plan."""

import pytest

from nexus_cli.core.model.gpt_oss.engine.memory import EVERYTHING
from nexus_cli.pipeline.model_memory import EngineOnDisk

GIB = 2**30


@pytest.fixture
def engine(make_tiny_model, tmp_path):
    """An engine of the 20B shape, of which only the config exists."""
    folder = make_tiny_model(tmp_path / "model")
    found = EngineOnDisk(folder, "auto")
    for name, value in {
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32,
        "num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64,
    }.items():  # fmt: skip
        setattr(found._config, name, value)
    return found


def test_short_memory_decodes_a_quarter_of_the_experts_at_a_time(engine):
    tokens = 16 * 1024
    whole = engine.transient_bytes(tokens)
    engine.plan_training(tokens=tokens, budget_bytes=40 * GIB)
    assert engine.kept == (EVERYTHING,) * 2
    assert engine.transient_bytes(tokens) == whole
    engine.plan_training(tokens=tokens, budget_bytes=1 * GIB)
    assert engine.kept != (EVERYTHING,) * 2
    assert whole - engine.transient_bytes(tokens) == 2 * 2 * 2880 * 2880 * (32 - 8)
    assert engine.waits_for_host  # for the rows of each piece: no CUDA graph can
    engine.plan_training(tokens=tokens, budget_bytes=40 * GIB)
    assert engine.transient_bytes(tokens) == whole


def test_few_rows_need_no_buffer_and_decode_no_layer(engine):
    plan = engine.plan_training(tokens=512, budget_bytes=400 * GIB)  # 64 rows an expert
    assert plan.activations.decoded_layers == 0
    assert "fused" in plan.describe()[0]
    assert engine.transient_bytes(512) < 2**28
    engine.plan_training(tokens=512, budget_bytes=2**25)  # too little, and nothing to decode
    assert not engine.waits_for_host


def test_forward_passes_decode_what_fits(engine):
    cost = 3 * 2880 * 2880 * 32 * 47 // 32
    assert "kept decoded: 0 of 2" in engine.plan_forward(tokens=16_384, budget_bytes=cost - 1)
    assert "kept decoded: 1 of 2" in engine.plan_forward(tokens=16_384, budget_bytes=cost)
    assert "kept decoded: 2 of 2" in engine.plan_forward(tokens=16_384, budget_bytes=9 * cost)
    assert "kept decoded: 0 of 2" in engine.plan_forward(tokens=64, budget_bytes=9 * cost)
    assert "kept decoded: 0 of 2" in engine.plan_forward(tokens=16_384, budget_bytes=-1)


def test_what_cannot_fit_is_refused_with_numbers(engine):
    with pytest.raises(ValueError, match=r"the inputs of 2 layers take 0\.2 GiB for 16,384 tokens"):
        engine.plan_training(tokens=16_384, budget_bytes=-8 * GIB)
