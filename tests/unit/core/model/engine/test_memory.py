"""How a memory budget is spent on activations."""

from nexus_cli.core.model.gpt_oss.engine.memory import (
    EVERYTHING,
    NOTHING,
    Kept,
    LayerBytes,
    plan_activations,
)

GPT_OSS_20B = LayerBytes.of(
    hidden=2880, expert_width=2880, shared_width=2880, top_k=4, heads=64, kv_heads=8, head_dim=64
)
TOKENS = 16 * 1024
GIB = 2**30


def plan(budget, **extra):
    return plan_activations(GPT_OSS_20B, layers=24, tokens=TOKENS, budget=budget, **extra)


def test_a_token_of_the_20b_keeps_88_kilobytes_a_layer():
    assert abs(GPT_OSS_20B.kept(EVERYTHING) - 88_000) < 1_000


def test_everything_is_kept_where_it_fits():
    found = plan(40 * GIB)
    assert found.kept == (EVERYTHING,) * 24
    assert found.activation_bytes == GPT_OSS_20B.kept(EVERYTHING) * TOKENS * 24
    assert found.decoded_layers == 0


def test_what_is_left_decodes_experts():
    found = plan(40 * GIB, decoded_bytes_a_layer=int(1.1 * GIB))
    assert found.decoded_layers == 7
    assert plan(400 * GIB, decoded_bytes_a_layer=GIB).decoded_layers == 24


def test_attention_is_kept_before_qkv_and_qkv_before_gate_up():
    for gib in (3, 6, 10, 20, 30):
        found = plan(gib * GIB)
        counts = [sum(getattr(k, n) for k in found.kept) for n in ("attention", "qkv", "gate_up")]
        assert counts == sorted(counts, reverse=True)
        assert found.activation_bytes <= gib * GIB
        for kept in found.kept:
            assert kept.attention or kept == NOTHING


def test_levels_are_raised_from_the_last_layer():
    found = plan(20 * GIB)
    raised = [kept.gate_up for kept in found.kept]
    assert raised == sorted(raised)
    assert 0 < sum(raised) < 24


def test_too_small_a_budget_has_no_plan():
    assert plan(2 * GIB) is None
    assert plan(-1) is None


def test_a_model_without_a_shared_expert_spends_nothing_on_it():
    layer = LayerBytes.of(
        hidden=64, expert_width=32, shared_width=0, top_k=2, heads=4, kv_heads=2, head_dim=16
    )
    found = plan_activations(layer, layers=2, tokens=10, budget=10**9)
    assert found.kept == (Kept(),) * 2
