"""What observers of experts are shown; that it is right, tests/pipeline/test_collect.py says."""

import pytest
import torch

from nexus_cli.core.model.gpt_oss.engine.attach import attach_engine
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.observe import down_norms, observe_experts


class Rows:
    """Counts rows."""

    def __init__(self):
        self.expert_rows = self.all_rows = 0

    def see_expert(self, expert, hidden_NI, slot_N, scores_TK):  # noqa: ARG002
        self.expert_rows += len(hidden_NI)

    def see_rows(self, hidden_RI, routing, scores_TK):  # noqa: ARG002
        self.all_rows += len(hidden_RI)


@pytest.fixture(params=[False, True], ids=["plain", "engine"])
def network(request, tiny_model_dir):
    model = load_model(tiny_model_dir, dtype=torch.float32)
    if request.param:
        attach_engine(model, experts_backend="torch")
    return model


@torch.no_grad()
def test_every_routed_row_of_every_layer_is_shown_once_a_pass(network):
    observers = [Rows() for _ in network.model.layers]
    observe_experts(network, observers)
    ids = torch.randint(0, 8000, (2, 10))
    for _ in range(2):
        network.model(input_ids=ids, use_cache=False)
    # two experts a token
    assert [o.expert_rows + o.all_rows for o in observers] == [2 * 2 * 20] * len(observers)


@torch.no_grad()
def test_observing_changes_no_output(network):
    ids = torch.randint(0, 8000, (2, 10))
    before = network.model(input_ids=ids, use_cache=False).last_hidden_state
    observe_experts(network, [Rows() for _ in network.model.layers])
    after = network.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(after, before)


def test_lengths_of_down_columns_are_the_same_of_experts_kept_decoded(tiny_model_dir):
    model = load_model(tiny_model_dir, dtype=torch.bfloat16)
    packed = down_norms(model)
    attach_engine(model, experts_backend="torch").decode(1)
    assert torch.equal(down_norms(model), packed)
    assert packed.min() > 0
