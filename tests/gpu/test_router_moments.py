import warnings

import numpy as np
import pytest
import torch

from nexus_cli.core.router.accumulate import MomentAccumulator
from nexus_cli.core.router.batching import make_batch
from nexus_cli.core.router.moments import RouterMoments, token_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYERS, EXPERTS, TOP_K, ROWS = 4, 128, 4, 4096


def accumulate(layers, device):
    accumulator = MomentAccumulator(RouterMoments.zeros(LAYERS, EXPERTS, TOP_K, 64), device)
    keys = token_keys(np.arange(64, ROWS), np.ones(ROWS - 64, np.int64), seed=0)
    body = torch.arange(64, ROWS, device=device)
    first = torch.arange(64, device=device)
    with torch.inference_mode():
        accumulator.add([rows.to(device) for rows in layers], body, first, keys)
    return accumulator.moments()


def test_a_gpu_counts_what_a_cpu_counts():
    generator = torch.Generator().manual_seed(0)
    layers = [2 * torch.randn(ROWS, EXPERTS, generator=generator) for _ in range(LAYERS)]
    host, gpu = accumulate(layers, torch.device("cpu")), accumulate(layers, torch.device("cuda"))
    for population in ("body", "first"):
        a, b = getattr(host, population), getattr(gpu, population)
        assert a.tokens == b.tokens
        for name in ("probability_LE", "outer_LEE", "weight_LE"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-11)
        for name in ("top1_LE", "topk_LE"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(host.reservoir.keys_R, gpu.reservoir.keys_R)


def test_adding_does_not_wait_for_the_device():
    device = torch.device("cuda")
    sequences = [np.arange(100, dtype=np.int32) + i for i in range(8)]
    accumulator = MomentAccumulator(RouterMoments.zeros(LAYERS, EXPERTS, TOP_K, 64), device)
    layers = [torch.randn(8 * 128, EXPERTS, device=device) for _ in range(LAYERS)]

    def add(seed):
        batch = make_batch(sequences, range(8 * seed, 8 * seed + 8), pad_id=0, seed=0).to(device)
        accumulator.add(layers, batch.body_N, batch.first_B, batch.keys_N)

    add(0)  # libraries may wait when they are loaded
    try:
        with warnings.catch_warnings(action="ignore"):  # the mode says that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        add(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert accumulator.moments().body.tokens == 2 * 8 * 99


def test_the_engine_sums_what_hidden_units_contribute(tmp_path):
    from nexus_cli.config.collect import CollectConfig
    from nexus_cli.io.workspace import Workspace
    from nexus_cli.pipeline import collect
    from nexus_cli.pipeline.router_statistics import load_moments

    def contributions(device, **settings):
        config = CollectConfig(
            data={"sources": "bundled-general"},
            target_tokens=20_000,
            max_candidates=300,
            dtype="float32" if device == "cpu" else "auto",
            output=tmp_path / device / "router_probs.npz",
            runtime={"device": device, **settings},
        )
        collect.run(config, Workspace(tmp_path / device / "ws"))
        return load_moments(config.output)[0].units_LEI

    exact, found = contributions("cpu"), contributions("cuda")
    # bf16 moves a few tokens to other experts, and so whole contributions
    assert np.abs(found - exact).sum() < 0.03 * exact.sum()
