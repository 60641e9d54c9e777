# SPDX-License-Identifier: Apache-2.0
"""GPT-OSS with packed MXFP4 experts and a shared expert that is always active.

This one file travels with every model that Nexus writes, so it needs torch and transformers
and nothing else: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Where
Nexus is installed, bf16 models on a CUDA device run their experts through its kernels.

    y = MoE(x) + g * S(x)

``MoE`` is GPT-OSS's routed block, its experts frozen in the checkpoint's own MXFP4 bytes;
``S`` is a dense copy of an expert's form (clamped SwiGLU with biases), and ``g`` one fp32
scalar a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssPreTrainedModel,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple

try:  # kernels for packed experts, where Nexus is installed
    from nexus_cli.core.model.gpt_oss.engine.operators import routed_experts
except ImportError:
    routed_experts = None  # type: ignore[assignment]

# Shape letters: B batch, S sequence, T = B*S tokens, H hidden, I expert width, E experts,
# K experts a token, R = T*K routed rows sorted by expert, V vocabulary.

SWIGLU_ALPHA = 1.702
FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
FP4_BLOCK = 32
E8M0_BIAS = 127

Packed = tuple[Tensor, Tensor]  # blocks and scales

# From 5.24 on transformers calls `past_key_values` `cache`, in arguments and in outputs.
_ARGUMENTS = inspect.signature(GptOssAttention.forward).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"


class NexusGptOssConfig(GptOssConfig):
    """A GPT-OSS config plus the shape of the shared expert."""

    model_type = "nexus_gpt_oss"
    base_model_ep_plan = None  # type: ignore[assignment]  # it names dense experts
    base_model_pp_plan = None  # type: ignore[assignment]

    num_shared_experts: int = 1
    shared_expert_intermediate_size: int | None = None
    experts_storage: str = "mxfp4"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_shared_experts not in (0, 1):
            raise ValueError(f"num_shared_experts is 0 or 1, not {self.num_shared_experts}")
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = self.intermediate_size
        super().__post_init__(**kwargs)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Decode MXFP4 weights, exactly (OCP Microscaling Formats v1.0, section 6.3).

    Args:
        blocks: uint8 ``[..., K/32, 16]``; the low nibble of byte j is element 2j.
        scales: uint8 ``[..., K/32]``; a block's scale is ``2^(scale - 127)``.
        dtype: of the result; every product is exact in bfloat16, float32 and float64.

    Returns:
        Weights ``[..., K]``.
    """
    codes = torch.tensor(FP4_VALUES, device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack((codes[byte & 15], codes[byte >> 4]), dim=-1)
    # Two factors, since 2^128 is infinite in float32 but 0 * 2^128 is 0.
    exponent = scales.int() - E8M0_BIAS
    half = exponent.div(2, rounding_mode="floor")
    values = F.embedding(blocks.int(), pairs).flatten(-2)
    values *= torch.exp2(half.float()).unsqueeze(-1)
    values *= torch.exp2((exponent - half).float()).unsqueeze(-1)
    return values.flatten(-2).to(dtype)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """GPT-OSS's activation: ``(u + 1) g sigmoid(1.702 g)``, g clamped above and u on both sides."""
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(SWIGLU_ALPHA * gate))


def clamped_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`clamped_swiglu` to its two inputs."""
    held_gate, held_up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    sigmoid = torch.sigmoid(SWIGLU_ALPHA * held_gate)
    slope = sigmoid * (1 + SWIGLU_ALPHA * held_gate * (1 - sigmoid))
    grad_gate = grad * (held_up + 1) * slope * (gate <= limit)
    grad_up = grad * held_gate * sigmoid * (up.abs() <= limit)
    return grad_gate, grad_up


class FrozenExperts(torch.autograd.Function):
    """The routed block over packed weights: gradients to the input and to the router's scores.

    The experts are frozen, so no weight gradient exists. Kept for the backward pass: the
    gate_up pre-activations ``[R, 2I]`` and the routing; weights are decoded again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        scores_TK: Tensor,
        experts_TK: Tensor,
        gate_up: Packed,
        gate_up_bias: Tensor,
        down: Packed,
        down_bias: Tensor,
        limit: float,
        observer: Any = None,
    ) -> Tensor:
        """The routed sum ``[T, H]``: ``sum_k score_k * expert_k(x)``, in the input's dtype.

        Args:
            ctx: of autograd.
            x_TH: input, floating.
            scores_TK: weight of each of a token's experts.
            experts_TK: their indices, int64.
            gate_up: blocks ``[E, 2I, H/32, 16]`` and scales ``[E, 2I, H/32]``; gate and up
                rows alternate.
            gate_up_bias: ``[E, 2I]``.
            down: blocks ``[E, H, I/32, 16]`` and scales ``[E, H, I/32]``.
            down_bias: ``[E, H]``.
            limit: of the clamped SwiGLU.
            observer: is shown what every hidden unit says, if there is one.
        """
        tokens, top_k = experts_TK.shape
        order_R = torch.argsort(experts_TK.reshape(-1), stable=True)
        counts = torch.bincount(experts_TK.reshape(-1), minlength=gate_up[0].shape[0]).tolist()
        token_R = order_R // top_k
        x_RH = x_TH[token_R]
        gate_up_RI = x_TH.new_empty(order_R.numel(), gate_up_bias.shape[-1])
        y_RH = torch.empty_like(x_RH)
        with torch.autocast(x_TH.device.type, enabled=False):
            for expert, rows in _segments(counts):
                gate_up_RI[rows] = _linear(x_RH[rows], gate_up, gate_up_bias, expert)
                hidden = clamped_swiglu(*_split(gate_up_RI[rows]), limit)
                if observer is not None:
                    observer.see_expert(expert, hidden, order_R[rows], scores_TK)
                y_RH[rows] = _linear(hidden, down, down_bias, expert)
        y_RH *= scores_TK.reshape(-1)[order_R, None]
        ctx.save_for_backward(
            gate_up_RI, scores_TK, order_R, *gate_up, gate_up_bias, *down, down_bias
        )
        ctx.counts, ctx.limit = counts, limit
        return _combine(y_RH, order_R, tokens, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input ``[T, H]`` and of the scores ``[T, K]``."""
        gate_up_RI, scores_TK, order_R, *packed = ctx.saved_tensors
        gate_up, down, down_bias = tuple(packed[0:2]), tuple(packed[3:5]), packed[5]
        tokens, top_k = scores_TK.shape
        grad_RH = grad_TH[order_R // top_k]
        score_R = scores_TK.reshape(-1)[order_R]
        grad_x_RH = torch.empty_like(grad_RH)
        grad_score_R = torch.empty_like(score_R)
        with torch.autocast(grad_TH.device.type, enabled=False):
            for expert, rows in _segments(ctx.counts):
                gate, up = _split(gate_up_RI[rows])
                # Without the score, so that the score's own gradient needs no saved output.
                grad_hidden = grad_RH[rows] @ _decode(down, expert, grad_RH.dtype)
                hidden = clamped_swiglu(gate, up, ctx.limit)
                through_bias = grad_RH[rows] @ down_bias[expert].to(grad_RH.dtype)
                grad_score_R[rows] = (hidden * grad_hidden).sum(-1) + through_bias
                grad_hidden = grad_hidden * score_R[rows, None]
                halves = clamped_swiglu_backward(grad_hidden, gate, up, ctx.limit)
                grad_gate_up = torch.stack(halves, dim=-1).flatten(-2)
                grad_x_RH[rows] = grad_gate_up @ _decode(gate_up, expert, grad_RH.dtype)
        grad_x_TH = _combine(grad_x_RH, order_R, tokens, top_k)
        grad_scores = torch.empty_like(grad_score_R).index_copy_(0, order_R, grad_score_R)
        return grad_x_TH, grad_scores.view_as(scores_TK), *(None,) * 7


def _segments(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Rows of each expert that has any, in the order of the experts."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _decode(packed: Packed, expert: int, dtype: torch.dtype) -> Tensor:
    blocks, scales = packed
    return dequantize_mxfp4(blocks[expert], scales[expert], dtype)


def _linear(x: Tensor, packed: Packed, bias: Tensor, expert: int) -> Tensor:
    return F.linear(x, _decode(packed, expert, x.dtype), bias[expert].to(x.dtype))


def _split(gate_up_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up are interleaved along the output axis."""
    return gate_up_RI[..., ::2], gate_up_RI[..., 1::2]


def _combine(rows_RH: Tensor, order_R: Tensor, tokens: int, top_k: int) -> Tensor:
    """Sum a token's K rows: a gather, so that the result does not depend on a race."""
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return rows_RH[inverse_R].view(tokens, top_k, -1).sum(dim=1)


class NexusTopKRouter(nn.Module):
    """Scores every expert, keeps the best K, and normalises over those."""

    def __init__(self, config: NexusGptOssConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.zeros(config.num_local_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_local_experts))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits over all experts ``[T, E]``, scores ``[T, K]`` and experts ``[T, K]``."""
        logits_TE = F.linear(x_TH, self.weight.to(x_TH.dtype), self.bias.to(x_TH.dtype))
        best_TK, experts_TK = torch.topk(logits_TE, self.top_k, dim=-1)
        return logits_TE, torch.softmax(best_TK, dim=-1), experts_TK


class PackedExperts(nn.Module):
    """The routed experts as the checkpoint holds them: frozen MXFP4 blocks and scales."""

    def __init__(self, config: NexusGptOssConfig) -> None:
        super().__init__()
        experts, hidden, width = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.limit = getattr(config, "swiglu_limit", 7.0)
        self.backend = "auto"  # or torch, dequant, fused
        self.decoded: Any = None  # a function in its place, where the packed bytes are given up
        self.observer: Any = None  # of statistics; see nexus_cli.core.model.gpt_oss.observe
        self.gate_up_proj_blocks = _bytes(experts, 2 * width, hidden // FP4_BLOCK, 16)
        self.gate_up_proj_scales = _bytes(experts, 2 * width, hidden // FP4_BLOCK)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * width), requires_grad=False)
        self.down_proj_blocks = _bytes(experts, hidden, width // FP4_BLOCK, 16)
        self.down_proj_scales = _bytes(experts, hidden, width // FP4_BLOCK)
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden), requires_grad=False)

    def forward(self, x_TH: Tensor, scores_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The routed sum ``[T, H]``, in the input's dtype.

        On a CUDA device in bf16 it runs through Nexus's kernels if Nexus is installed and
        ``backend`` is not ``torch``; everywhere else as :class:`FrozenExperts`.
        """
        if self.decoded is not None:
            decoded: Tensor = self.decoded(x_TH, scores_TK, experts_TK)
            return decoded
        arguments = (
            x_TH,
            scores_TK,
            experts_TK,
            (self.gate_up_proj_blocks, self.gate_up_proj_scales),
            self.gate_up_proj_bias,
            (self.down_proj_blocks, self.down_proj_scales),
            self.down_proj_bias,
            self.limit,
        )
        kernels = routed_experts is not None and self.backend != "torch"
        if kernels and x_TH.is_cuda and x_TH.dtype == torch.bfloat16:
            return routed_experts(*arguments, backend=self.backend)
        routed: Tensor = FrozenExperts.apply(*arguments, self.observer)
        return routed


def _bytes(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)


class GptOssSharedExpert(nn.Module):
    """``g * S(x)``: a dense expert that sees every token, behind a learnable scalar gate.

    ``S(x) = W_down [(u + 1) g sigmoid(1.702 g)] + b_down`` with ``g = W_gate x + b_gate``
    clamped above and ``u = W_up x + b_up`` clamped on both sides, as in GPT-OSS's own experts.
    Weights may be kept in fp32 while the model runs in bf16: they are cast on use.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, swiglu_limit: float = 7.0) -> None:
        super().__init__()
        self.limit = swiglu_limit
        self.gate_proj = nn.Linear(hidden_size, intermediate_size)
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.output_gate = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x_TH: Tensor) -> Tensor:
        """``[T, H]`` in float32 or wider, so that adding it to the routed sum rounds once."""
        hidden = clamped_swiglu(_cast(self.gate_proj, x_TH), _cast(self.up_proj, x_TH), self.limit)
        return self.output_gate * _cast(self.down_proj, hidden)


def _cast(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


class NexusGptOssMoE(nn.Module):
    """The routed experts, and beside them the shared one."""

    def __init__(self, config: NexusGptOssConfig) -> None:
        super().__init__()
        self.router = NexusTopKRouter(config)
        self.experts = PackedExperts(config)
        if config.num_shared_experts:
            self.shared_expert = GptOssSharedExpert(
                config.hidden_size,
                config.shared_expert_intermediate_size or config.intermediate_size,
                getattr(config, "swiglu_limit", 7.0),
            )

    def forward(self, x_BSH: Tensor, shared_experts: bool = True) -> tuple[Tensor, Tensor]:
        """The block's output ``[B, S, H]`` and the router's logits ``[T, E]``."""
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        logits_TE, scores_TK, experts_TK = self.router(x_TH)
        y_TH = self.experts(x_TH, scores_TK, experts_TK)
        if shared_experts and hasattr(self, "shared_expert"):
            y_TH = (y_TH + self.shared_expert(x_TH)).to(x_TH.dtype)
        return y_TH.view_as(x_BSH), logits_TE


class NexusGptOssDecoderLayer(GradientCheckpointingLayer):
    """GPT-OSS's layer around :class:`NexusGptOssMoE`."""

    def __init__(self, config: NexusGptOssConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = GptOssAttention(config=config, layer_idx=layer_idx)
        self.mlp = NexusGptOssMoE(config)
        self.input_layernorm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x_BSH: Tensor, shared_experts: bool = True, **attention: Any
    ) -> tuple[Tensor, Tensor]:
        """The layer's output ``[B, S, H]`` and its router's logits ``[T, E]``."""
        x_BSH = x_BSH + self.self_attn(hidden_states=self.input_layernorm(x_BSH), **attention)[0]
        y_BSH, logits_TE = self.mlp(self.post_attention_layernorm(x_BSH), shared_experts)
        return x_BSH + y_BSH, logits_TE


class NexusGptOssPreTrainedModel(GptOssPreTrainedModel):
    """What the loader of transformers needs to know."""

    config: NexusGptOssConfig
    config_class = NexusGptOssConfig
    _no_split_modules = ["NexusGptOssDecoderLayer"]
    _keep_in_fp32_modules_strict = ["output_gate"]
    _can_record_outputs = {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights, for a model that is not loaded from a checkpoint."""
        super()._init_weights(module)
        if isinstance(module, NexusTopKRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, GptOssSharedExpert):
            init.zeros_(module.output_gate)


class NexusGptOssModel(NexusGptOssPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: NexusGptOssConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            NexusGptOssDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = GptOssRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.engine: Any = None  # Nexus's fused layers, where it attached them
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        shared_experts: bool = True,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the layers.

        Position ids that start again at 0 part the documents of a packed sequence: attention
        does not cross them (without an attention mask and without a cache).

        Args:
            input_ids: ``[B, S]``; or ``inputs_embeds`` ``[B, S, H]``.
            attention_mask: ``[B, S]``, 1 for tokens and 0 for padding.
            position_ids: ``[B, S]``.
            past_key_values: cache of a generation.
            inputs_embeds: in place of ``input_ids``.
            use_cache: return a cache; the config's value by default.
            shared_experts: ``False`` gives the original model, bit for bit.
            output_router_logits: return every layer's logits ``[B*S, E]``.
            output_hidden_states: return every layer's input, and the last output.
            cache: ``past_key_values``, as transformers calls it from 5.24 on.
            kwargs: passed to the attention function.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if cache is None:
            cache = past_key_values
        elif past_key_values is not None:
            raise ValueError("give either cache or past_key_values, two names of one thing")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        x_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(seen, seen + x_BSH.shape[1], device=x_BSH.device)[None]
        plain = output_hidden_states or cache is not None or attention_mask is not None
        if self.engine is not None and not plain:
            run: MoeModelOutputWithPast = self.engine.run(
                self,
                x_BSH,
                position_ids,
                shared_experts=shared_experts,
                output_router_logits=bool(output_router_logits),
            )
            return run
        masks = self._masks(x_BSH, attention_mask, cache, position_ids)
        named: dict[str, Any] = {CACHE: cache}
        position_embeddings = self.rotary_emb(x_BSH, position_ids)
        hidden: list[Tensor] = []
        logits: list[Tensor] = []
        for kind, layer in zip(self.config.layer_types or (), self.layers, strict=True):
            if output_hidden_states:
                hidden.append(x_BSH)
            x_BSH, logits_TE = layer(
                x_BSH,
                shared_experts,
                attention_mask=masks[kind],
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **named,
                **kwargs,
            )
            logits.append(logits_TE)
        x_BSH = self.norm(x_BSH)
        return MoeModelOutputWithPast(
            last_hidden_state=x_BSH,
            hidden_states=(*hidden, x_BSH) if output_hidden_states else None,
            router_logits=tuple(logits) if output_router_logits else None,  # type: ignore[arg-type]
            **named,
        )

    def _masks(
        self,
        x_BSH: Tensor,
        attention_mask: Tensor | dict[str, Any] | None,
        cache: Cache | None,
        position_ids: Tensor,
    ) -> dict[str, Any]:
        """A mask for each kind of layer; ``generate`` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        made: dict[str, Any] = {}
        named: dict[str, Any] = {CACHE: cache}
        for kind, make in {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }.items():
            made[kind] = make(
                config=self.config,
                inputs_embeds=x_BSH,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **named,
            )
        return made


class NexusGptOssForCausalLM(NexusGptOssPreTrainedModel, GenerationMixin):
    """The language model. Its loss is cross entropy alone: no auxiliary loss is ever added."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: NexusGptOssConfig) -> None:
        super().__init__(config)
        self.model = NexusGptOssModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits ``[B, S, V]`` of the next token, and their loss where ``labels`` are given."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(out.last_hidden_state[:, keep])
        loss = None if labels is None else self.loss_function(logits_BSV, labels, self.vocab_size)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
            **{CACHE: getattr(out, CACHE)},
        )
