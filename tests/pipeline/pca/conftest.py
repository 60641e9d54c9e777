"""Router statistics of small layers, and the stage that reads them."""

import json

import numpy as np
import pytest
import torch

from nexus_cli.config.pca import PcaConfig
from nexus_cli.core.router.accumulate import MomentAccumulator
from nexus_cli.core.router.moments import RouterMoments, token_keys
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import pca
from nexus_cli.pipeline.router_statistics import save_moments

LAYERS, EXPERTS, TOP_K = 3, 8, 2
MODEL = {"model": "tiny", "model_fingerprint": "f" * 8}


def make_moments(tokens=400, layers=LAYERS, experts=EXPERTS, twins=True, uneven=False):
    """A router in which expert 2 varies most, and the last expert repeats it exactly.

    With ``uneven``, every layer prefers its first experts more than the layer before does.
    """
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(tokens, experts, generator=generator) for _ in range(layers)]
    for layer, rows in enumerate(logits):
        rows[:, min(2, experts - 1)] *= 3
        rows[:, min(2, experts - 1)] += 1
        if uneven:
            rows.sub_(0.4 * layer * torch.arange(experts))
        if twins:
            rows[:, -1] = rows[:, 2]
    start = RouterMoments.zeros(layers, experts, TOP_K, reservoir_size=64)
    accumulator = MomentAccumulator(start, torch.device("cpu"))
    keys = token_keys(np.arange(10, tokens), np.ones(tokens - 10, np.int64), seed=0)
    accumulator.add(logits, torch.arange(10, tokens), torch.arange(10), keys)
    return accumulator.moments()


@pytest.fixture
def collected(tmp_path):
    """Router statistics where the user put them."""
    path = tmp_path / "data" / "router_probs.npz"
    save_moments(path, make_moments(), MODEL)
    return path


@pytest.fixture
def uneven(tmp_path):
    """Statistics of layers that need different numbers of experts for a share of usage."""
    path = tmp_path / "data" / "router_probs.npz"
    save_moments(path, make_moments(twins=False, uneven=True), MODEL)
    return path


@pytest.fixture
def router_moments():
    return make_moments


@pytest.fixture
def run():
    """Run the stage and return what it wrote."""

    def start(path, workspace, **settings):
        config = PcaConfig(**{"input": path, "top_k": 3, "plots": False} | settings)
        pca.run(config, Workspace(workspace))
        return json.loads((config.output or workspace / "pca" / "pca_stats.json").read_text())

    return start
