"""The routed block over frozen experts, forward and backward, written once over the products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nexus_cli.core.kernels.routing import Routing
from nexus_cli.core.kernels.swiglu import swiglu_rows, swiglu_rows_backward
from nexus_cli.core.model.gpt_oss.engine.products import PackedWeights, Products

# Shape letters in this file: T tokens, K experts a token, R = T * K routed rows sorted by expert,
# H hidden, I expert width, E experts.


@dataclass(frozen=True)
class RoutedBlock:
    """One layer's experts: how to multiply with them, and what is added beside the products.

    Attributes:
        products: with the packed weights, by one backend.
        gate_up_bias: ``[E, 2I]``.
        down_bias: ``[E, H]``.
        limit: of the clamped SwiGLU.
        observer: is shown the activations of forward passes; see ``observe.py``.
    """

    products: Products
    gate_up_bias: Tensor
    down_bias: Tensor
    limit: float
    observer: Any = None

    @classmethod
    def of(cls, weights: PackedWeights, products: Products) -> RoutedBlock:
        """The block over ``weights``, multiplied with by ``products``."""
        return cls(products, weights.gate_up_bias, weights.down_bias, weights.limit)


def experts_forward(
    block: RoutedBlock, x_TH: Tensor, routing: Routing, scores_TK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every expert's output for its rows, before bias and score.

    Args:
        block: the experts.
        x_TH: their input.
        routing: which rows are a token's.
        scores_TK: weight of each of a token's experts, for the block's observer.

    Returns:
        The rows ``[R, H]``, to be combined with scores and ``down_bias``; and the gate_up
        pre-activations ``[R, 2I]`` without their bias, which are all that the backward pass needs.
    """
    gate_up_RI = block.products.gate_up(x_TH, routing)
    hidden_RI = swiglu_rows(gate_up_RI, block.gate_up_bias, routing.expert_R, block.limit)
    if block.observer is not None:
        block.observer.see_rows(hidden_RI, routing, scores_TK)
    return block.products.down(hidden_RI, routing), gate_up_RI


@dataclass(frozen=True)
class ExpertGradients:
    """What flows back out of the routed block.

    Attributes:
        scores_TK: gradient of the scores, fp32 (float64 if the input is).
        rows_RH: gradient of every row's input, to be summed over a token's rows; ``None`` if it
            was not asked for.
    """

    scores_TK: Tensor
    rows_RH: Tensor | None


def experts_backward(
    block: RoutedBlock,
    grad_TH: Tensor,
    gate_up_RI: Tensor,
    scores_TK: Tensor,
    experts_TK: Tensor,
    routing: Routing,
    *,
    needs_input: bool = True,
    overwrite: bool = False,
) -> ExpertGradients:
    """Gradients of ``sum_k score_k (W_down act + b_down)`` to the input rows and the scores.

    No expert output was kept: with ``d_act = grad W_down``, taken without the score,
    ``d score = <act, d_act> + <grad, b_down>`` and everything below is scaled by the score.

    Args:
        block: the experts.
        grad_TH: gradient of the combined output.
        gate_up_RI: pre-activations of the forward pass, without bias.
        scores_TK: weight of each of a token's experts.
        experts_TK: their indices.
        routing: of the forward pass.
        needs_input: whether anything below wants a gradient; without it one product is saved.
        overwrite: the gradient of ``gate_up_RI`` may take its memory.
    """
    grad_hidden_RI = block.products.grad_down(grad_TH, routing)
    score_R = scores_TK.reshape(-1).index_select(0, routing.slot_R)
    grad_gate_up_RI, dot_R = swiglu_rows_backward(
        grad_hidden_RI,
        gate_up_RI,
        block.gate_up_bias,
        routing.expert_R,
        score_R,
        block.limit,
        out=gate_up_RI if overwrite else None,
    )
    del grad_hidden_RI
    through_bias_TE = grad_TH @ block.down_bias.to(grad_TH.dtype).T
    scores_grad_TK = dot_R.index_select(0, routing.row_TK.reshape(-1)).view_as(scores_TK)
    scores_grad_TK = scores_grad_TK + through_bias_TE.gather(1, experts_TK.long())
    rows_RH = block.products.grad_gate_up(grad_gate_up_RI, routing) if needs_input else None
    return ExpertGradients(scores_grad_TK, rows_RH)
