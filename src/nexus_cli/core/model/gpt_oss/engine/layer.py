"""One decoder layer as one autograd function: what it keeps is chosen, what it keeps not is redone.

Frozen weights have no gradient, so the backward pass is the input gradients of the products, plus
the weight gradients of the shared expert (and of the router, if it trains). Everything between two
products is one kernel. ``modeling_nexus_gpt_oss.py`` says the same in plain PyTorch and is the
oracle of this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nexus_cli.core.kernels.attention import sink_attention, sink_attention_backward
from nexus_cli.core.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from nexus_cli.core.kernels.rotary import rotate_
from nexus_cli.core.kernels.router import top_k_softmax, top_k_softmax_backward
from nexus_cli.core.kernels.routing import Routing, sort_by_expert
from nexus_cli.core.kernels.rows import combine_rows
from nexus_cli.core.model.gpt_oss.engine.experts import (
    RoutedBlock,
    experts_backward,
    experts_forward,
)
from nexus_cli.core.model.gpt_oss.engine.memory import Kept
from nexus_cli.core.model.gpt_oss.engine.sequence import Positions
from nexus_cli.core.model.gpt_oss.engine.shared import (
    SharedExpert,
    shared_backward,
    shared_forward,
    shared_pre_activations,
    weight_gradient,
)

# Shape letters in this file: B sequences, S positions, T = B * S tokens, H hidden, Q width of
# queries, keys and values together, E experts, K experts a token, R = T * K rows, I expert width.


@dataclass(frozen=True)
class FrozenLayer:
    """The frozen tensors of a layer, and its constants.

    Attributes:
        kind: ``full_attention`` or ``sliding_attention``.
        window: positions that a sliding layer sees, itself included; else ``None``.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: of one head.
        scale: of the attention logits.
        epsilon: of the norms.
        top_k: experts a token.
        input_norm: weight ``[H]`` of the norm before attention.
        mlp_norm: weight ``[H]`` of the norm before the experts.
        qkv_weight: projections of queries, keys and values, one under the other, ``[Q, H]``.
        qkv_bias: ``[Q]``.
        out_weight: ``[H, heads * head_dim]``.
        out_bias: ``[H]``.
        sinks: a logit for each head.
        block: the routed experts.
    """

    kind: str
    window: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    epsilon: float
    top_k: int
    input_norm: Tensor
    mlp_norm: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    sinks: Tensor
    block: RoutedBlock

    @property
    def heads(self) -> dict[str, Any]:
        """Arguments of the attention kernels."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "scale": self.scale,
            "window": self.window,
        }


@dataclass
class _Activations:
    """Results of a forward pass; the backward pass fills in what was not kept."""

    x_TH: Tensor
    qkv_TQ: Tensor | None = None
    attended: Tensor | None = None  # [T, heads * head_dim]
    lse_BHS: Tensor | None = None
    middle_TH: Tensor | None = None  # the sum after attention
    gate_up_RI: Tensor | None = None
    gate_TI: Tensor | None = None
    up_TI: Tensor | None = None
    scores_TK: Tensor | None = None
    experts_TK: Tensor | None = None
    routing: Routing | None = None


def decoder_layer(
    layer: FrozenLayer,
    positions: Positions,
    kept: Kept,
    x_TH: Tensor,
    router: tuple[Tensor, Tensor],
    shared: SharedExpert | None,
) -> tuple[Tensor, Tensor]:
    """The layer's output ``[T, H]`` and its router's logits ``[T, E]``.

    Args:
        layer: frozen tensors.
        positions: of the micro-batch.
        kept: what stays for the backward pass.
        x_TH: the layer's input.
        router: weight ``[E, H]`` and bias ``[E]``.
        shared: the shared expert's tensors; ``None`` leaves it out.
    """
    tensors = shared.tensors if shared is not None else ()
    out: tuple[Tensor, Tensor] = _DecoderLayer.apply(
        layer, positions, kept, x_TH, *router, *tensors
    )
    return out


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: FrozenLayer,
        positions: Positions,
        kept: Kept,
        x_TH: Tensor,
        router_weight: Tensor,
        router_bias: Tensor,
        *shared: Tensor,
    ) -> tuple[Tensor, Tensor]:
        expert = SharedExpert(*shared) if shared else None
        with torch.autocast(x_TH.device.type, enabled=False):
            done = _Activations(x_TH)
            normed_TH = _attention_half(layer, positions, done)
            logits_TE = _route(layer, router_weight, router_bias, normed_TH, done)
            out_TH = _experts_half(layer, normed_TH, expert, done)
        if any(ctx.needs_input_grad):
            _keep(ctx, kept, done, (router_weight, router_bias, *shared))
            ctx.layer, ctx.positions = layer, positions
            ctx.set_materialize_grads(False)
        return out_TH, logits_TE

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TH: Tensor | None, grad_logits_TE: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        done, (router_weight, router_bias, *shared) = _restore(ctx)
        expert = SharedExpert(*shared) if shared else None
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[3:6]
        layer, positions = ctx.layer, ctx.positions
        if grad_TH is None:  # only the router's logits were used
            grad_TH = torch.zeros_like(done.x_TH)
        grad_TH = grad_TH.contiguous()
        with torch.autocast(grad_TH.device.type, enabled=False):
            below = needs_x or needs_weight or needs_bias
            router = (router_weight, router_bias) if below else None
            normed_TH, rstd_T = _redo(layer, positions, done, router, expert)
            down = _ExpertsBackward(layer, done, normed_TH, grad_TH)
            shared_grads: tuple[Tensor | None, ...] = ()
            if expert is not None:
                shared_grads = down.through_shared(expert, needs_x=needs_x)
            router_grads: tuple[Tensor | None, Tensor | None] = (None, None)
            if router is not None:
                router_grads = down.through_routed(
                    router,
                    grad_logits_TE,
                    needs_x=needs_x,
                    needs_weight=needs_weight,
                    needs_bias=needs_bias,
                )
            grad_x_TH = None
            if needs_x:
                grad_middle_TH = down.through_norm(rstd_T)
                grad_x_TH = _attention_backward(layer, positions, done, grad_middle_TH)
        return None, None, None, grad_x_TH, *router_grads, *shared_grads


def _attention_half(layer: FrozenLayer, positions: Positions, done: _Activations) -> Tensor:
    """Norm, attention, residual, norm; returns the experts' normed input ``[T, H]``."""
    done.qkv_TQ = _qkv(layer, positions, done.x_TH)[0]
    batched = done.qkv_TQ.view(positions.batch, positions.length, -1)
    attended, done.lse_BHS = sink_attention(
        batched, layer.sinks, positions.starts[layer.kind], **layer.heads
    )
    done.attended = attended.view(len(done.x_TH), -1)
    projected_TH = F.linear(done.attended, layer.out_weight, layer.out_bias)
    done.middle_TH, normed_TH, _ = add_rms_norm(
        done.x_TH, projected_TH, layer.mlp_norm, layer.epsilon
    )
    return normed_TH


def _qkv(layer: FrozenLayer, positions: Positions, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries, keys and values ``[T, Q]``, and the norm's ``1 / rms`` ``[T]``."""
    normed_TH, rstd_T = rms_norm(x_TH, layer.input_norm, layer.epsilon)
    qkv_TQ = F.linear(normed_TH, layer.qkv_weight, layer.qkv_bias)
    _rotate(layer, positions, qkv_TQ)
    return qkv_TQ, rstd_T


def _rotate(
    layer: FrozenLayer, positions: Positions, qkv_TQ: Tensor, *, inverse: bool = False
) -> None:
    rotate_(
        qkv_TQ,
        positions.cos_TC,
        positions.sin_TC,
        num_heads=layer.num_heads + layer.num_kv_heads,
        head_dim=layer.head_dim,
        inverse=inverse,
    )


def _route(
    layer: FrozenLayer, weight: Tensor, bias: Tensor, normed_TH: Tensor, done: _Activations
) -> Tensor:
    dtype = normed_TH.dtype
    logits_TE = F.linear(normed_TH, weight.to(dtype), bias.to(dtype))
    done.scores_TK, done.experts_TK = top_k_softmax(logits_TE, layer.top_k)
    done.routing = sort_by_expert(done.experts_TK, logits_TE.shape[-1])
    return logits_TE


def _experts_half(
    layer: FrozenLayer, normed_TH: Tensor, expert: SharedExpert | None, done: _Activations
) -> Tensor:
    """Routed and shared experts and the residual, summed in one kernel that rounds once."""
    assert done.routing is not None
    rows_RH, done.gate_up_RI = experts_forward(layer.block, normed_TH, done.routing, done.scores_TK)
    beside: dict[str, Any] = {}
    if expert is not None:
        shared_TH, done.gate_TI, done.up_TI = shared_forward(expert, normed_TH, layer.block.limit)
        beside = {
            "shared_TH": shared_TH,
            "shared_bias_H": expert.down_bias,
            "shared_scale": expert.output_gate,
        }
    return combine_rows(
        rows_RH,
        done.routing,
        scores_TK=done.scores_TK,
        experts_TK=done.experts_TK,
        bias_EH=layer.block.down_bias,
        residual_TH=done.middle_TH,
        **beside,
    )


_SAVED = (
    "x_TH", "qkv_TQ", "attended", "lse_BHS", "middle_TH",
    "gate_up_RI", "gate_TI", "up_TI", "scores_TK", "experts_TK",
)  # fmt: skip


def _keep(ctx: Any, kept: Kept, done: _Activations, parameters: tuple[Tensor, ...]) -> None:
    """Hand to autograd what the policy keeps; the rest is freed with ``done``."""
    below = ctx.needs_input_grad[3] or any(ctx.needs_input_grad[4:6])
    if not ctx.needs_input_grad[3]:  # nothing below trains: attention is never differentiated
        done.qkv_TQ = done.attended = done.lse_BHS = None
    if not below:
        done.gate_up_RI = done.scores_TK = done.experts_TK = done.routing = None
    if not kept.attention:
        done.attended = done.lse_BHS = done.middle_TH = None
        done.scores_TK = done.experts_TK = done.routing = None
    if not kept.qkv or not kept.attention:
        done.qkv_TQ = None
    if not kept.gate_up or not kept.attention:
        done.gate_up_RI = None
    if not kept.shared or not kept.attention:
        done.gate_TI = done.up_TI = None
    routing = done.routing
    ctx.top_k = routing.top_k if routing is not None else None
    vectors = () if routing is None else routing.vectors
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(*parameters, *(getattr(done, name) for name in _SAVED), *vectors)


def _restore(ctx: Any) -> tuple[_Activations, tuple[Tensor, ...]]:
    saved = ctx.saved_tensors
    parameters = saved[: ctx.num_parameters]
    named = saved[ctx.num_parameters : ctx.num_parameters + len(_SAVED)]
    done = _Activations(**dict(zip(_SAVED, named, strict=True)))
    if ctx.top_k is not None:
        done.routing = Routing.of(saved[ctx.num_parameters + len(_SAVED) :], ctx.top_k)
    return done, parameters


def _redo(
    layer: FrozenLayer,
    positions: Positions,
    done: _Activations,
    router: tuple[Tensor, Tensor] | None,
    expert: SharedExpert | None,
) -> tuple[Tensor, Tensor]:
    """Compute again what the backward pass needs and the forward pass did not keep.

    Args:
        layer: frozen tensors.
        positions: of the micro-batch.
        done: what was kept; filled in.
        router: weight and bias; ``None`` where no gradient goes through the routed experts.
        expert: the shared expert.

    Returns:
        The experts' normed input ``[T, H]`` and its ``1 / rms`` ``[T]``.
    """
    if done.middle_TH is None:
        _attention_half(layer, positions, done)
    assert done.middle_TH is not None
    normed_TH, rstd_T = rms_norm(done.middle_TH, layer.mlp_norm, layer.epsilon)
    if router is not None and done.routing is None:
        _route(layer, *router, normed_TH, done)
    if expert is not None and done.gate_TI is None:
        done.gate_TI, done.up_TI = shared_pre_activations(expert, normed_TH)
    return normed_TH, rstd_T


class _ExpertsBackward:
    """Gradients through the routed and the shared experts, summed where they meet."""

    def __init__(
        self, layer: FrozenLayer, done: _Activations, normed_TH: Tensor, grad_TH: Tensor
    ) -> None:
        self._layer, self._done = layer, done
        self._normed_TH, self._grad_TH = normed_TH, grad_TH
        self._beside_TH: Tensor | None = None  # gradient of the normed input, dense parts
        self._rows_RH: Tensor | None = None  # and the routed part, row by row

    def through_shared(self, expert: SharedExpert, *, needs_x: bool) -> tuple[Tensor, ...]:
        done = self._done
        assert done.gate_TI is not None
        assert done.up_TI is not None
        grads, self._beside_TH = shared_backward(
            expert,
            self._grad_TH,
            self._normed_TH,
            (done.gate_TI, done.up_TI),
            self._layer.block.limit,
            needs_input=needs_x,
        )
        return grads

    def through_routed(
        self,
        router: tuple[Tensor, Tensor],
        grad_logits_TE: Tensor | None,
        *,
        needs_x: bool,
        needs_weight: bool,
        needs_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        done, (weight_EH, bias_E) = self._done, router
        assert done.routing is not None
        assert done.scores_TK is not None
        assert done.experts_TK is not None
        fresh = done.gate_up_RI is None
        if done.gate_up_RI is None:
            done.gate_up_RI = self._layer.block.products.gate_up(self._normed_TH, done.routing)
        grads = experts_backward(
            self._layer.block,
            self._grad_TH,
            done.gate_up_RI,
            done.scores_TK,
            done.experts_TK,
            done.routing,
            needs_input=needs_x,
            overwrite=fresh,
        )
        done.gate_up_RI, self._rows_RH = None, grads.rows_RH
        logits_TE = top_k_softmax_backward(
            grads.scores_TK, done.scores_TK, done.experts_TK, len(weight_EH)
        )
        if grad_logits_TE is not None:
            logits_TE = logits_TE + grad_logits_TE
        logits_TE = logits_TE.to(self._normed_TH.dtype)
        if needs_x:
            weight_EH = weight_EH.to(logits_TE.dtype)
            self._beside_TH = (
                logits_TE @ weight_EH
                if self._beside_TH is None
                else torch.addmm(self._beside_TH, logits_TE, weight_EH)
            )
        weight_grad = bias_grad = None
        if needs_weight:
            weight_grad = weight_gradient(logits_TE, self._normed_TH, router[0].dtype)
        if needs_bias:
            wide = torch.promote_types(bias_E.dtype, torch.float32)
            bias_grad = logits_TE.sum(0, dtype=wide).to(bias_E.dtype)
        return weight_grad, bias_grad

    def through_norm(self, rstd_T: Tensor) -> Tensor:
        """Gradient of the sum after attention ``[T, H]``, its own path included."""
        done = self._done
        assert self._rows_RH is not None
        assert done.routing is not None
        assert done.middle_TH is not None
        normed_grad_TH = combine_rows(self._rows_RH, done.routing, residual_TH=self._beside_TH)
        self._rows_RH = self._beside_TH = None
        return rms_norm_backward(
            normed_grad_TH, done.middle_TH, rstd_T, self._layer.mlp_norm, self._grad_TH
        )


def _attention_backward(
    layer: FrozenLayer, positions: Positions, done: _Activations, grad_TH: Tensor
) -> Tensor:
    """Gradient of the layer's input ``[T, H]`` from that of the sum after attention."""
    assert done.attended is not None
    assert done.lse_BHS is not None
    shape = positions.batch, positions.length, -1
    if done.qkv_TQ is None:
        done.qkv_TQ, rstd_T = _qkv(layer, positions, done.x_TH)
    else:
        _, rstd_T = rms_norm(done.x_TH, layer.input_norm, layer.epsilon)
    grad_qkv = sink_attention_backward(
        (grad_TH @ layer.out_weight).view(shape),
        done.qkv_TQ.view(shape),
        done.attended.view(shape),
        done.lse_BHS,
        positions.starts[layer.kind],
        positions.lasts[layer.kind],
        **layer.heads,
    ).view(len(grad_TH), -1)
    _rotate(layer, positions, grad_qkv, inverse=True)
    return rms_norm_backward(
        grad_qkv @ layer.qkv_weight, done.x_TH, rstd_T, layer.input_norm, grad_TH
    )
