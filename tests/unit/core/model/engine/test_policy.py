"""What the engine refuses, and what it chooses by numbers of rows."""

import types

import pytest

from nexus_cli.core.model.gpt_oss.engine.policy import describe, shape_refused

GPT_OSS = {"head_dim": 64, "num_experts_per_tok": 4, "num_local_experts": 128}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"head_dim": 96}, "heads of 96 numbers"),
        ({"num_experts_per_tok": 9}, "9 experts a token"),
        ({"num_local_experts": 384}, "384 experts a layer"),
    ],
)
def test_shapes_that_the_kernels_cannot_hold_are_named(change, words):
    refused = shape_refused(types.SimpleNamespace(**(GPT_OSS | change)))
    assert refused is None if words is None else words in refused


@pytest.mark.parametrize(("tokens", "chosen"), [(1024, "fused"), (4096, "dequant")])
def test_the_choice_is_said_with_its_numbers(tokens, chosen):
    assert describe("auto", tokens, 4, 32).startswith(f"experts: {chosen} ({tokens // 8} rows")
