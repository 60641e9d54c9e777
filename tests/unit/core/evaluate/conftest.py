"""A language model in ten lines whose hidden states depend on all of the context."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nexus_cli.core.data.document import TokenizedDocument


class FakeModel(nn.Module):
    """``hidden[t] = shared part + mean of the embeddings up to t + position``, float64."""

    def __init__(self, vocab: int = 50, hidden: int = 12, experts: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(values, requires_grad=False)

        self.embedding, self.extra = draw(vocab, hidden), draw(hidden)
        self.routers = nn.ParameterList([draw(experts, hidden) for _ in range(3)])
        self.lm_head = SimpleNamespace(weight=draw(vocab, hidden))
        self.model = self._forward

    def _forward(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        use_cache: bool,
        shared_experts: bool,
        output_router_logits: bool,
    ) -> SimpleNamespace:
        assert not use_cache
        assert output_router_logits
        count = torch.arange(1, input_ids.shape[1] + 1).view(1, -1, 1)
        hidden = self.embedding[input_ids].cumsum(1) / count + 0.01 * position_ids.unsqueeze(2)
        if shared_experts:
            hidden = hidden + 0.3 * self.extra
        logits = tuple((hidden @ router.T).flatten(0, 1) for router in self.routers)
        return SimpleNamespace(last_hidden_state=hidden, router_logits=logits)


def document(
    ids: list[int], *, scored: list[int] | None = None, values: tuple[int, ...] = ()
) -> TokenizedDocument:
    """Plain text (all but the first scored), or a chat with the ``scored`` positions."""
    mask = np.ones(len(ids), dtype=bool)
    mask[0] = False
    if scored is not None:
        mask[:] = False
        mask[scored] = True
    value = np.zeros(len(ids), dtype=bool)
    value[list(values)] = True
    return TokenizedDocument(
        input_ids=np.array(ids, dtype=np.int32),
        loss_mask=mask,
        value_mask=value,
        num_bytes=3 * int(mask.sum()),
        source_index=0,
        id="0" * 64,
        is_chat=scored is not None,
    )


def random_documents(seed: int, lengths: list[int], vocab: int = 50) -> list[TokenizedDocument]:
    generator = np.random.default_rng(seed)
    return [document(generator.integers(vocab, size=n).tolist()) for n in lengths]


@pytest.fixture
def fakes() -> SimpleNamespace:
    """The factories of this file."""
    return SimpleNamespace(
        FakeModel=FakeModel, document=document, random_documents=random_documents
    )
