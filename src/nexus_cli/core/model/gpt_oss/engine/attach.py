"""Put the fast layers on a loaded model, and plan what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from nexus_cli.core.kernels.mxfp4_decode import order_scales
from nexus_cli.core.model.gpt_oss.engine.device import on_device_of
from nexus_cli.core.model.gpt_oss.engine.experts import RoutedBlock
from nexus_cli.core.model.gpt_oss.engine.graphs import ForwardGraph, Stack, TrainingGraph
from nexus_cli.core.model.gpt_oss.engine.layer import FrozenLayer, decoder_layer
from nexus_cli.core.model.gpt_oss.engine.memory import (
    EVERYTHING,
    NOTHING,
    ActivationPlan,
    Kept,
    LayerBytes,
    plan_activations,
)
from nexus_cli.core.model.gpt_oss.engine.norm import FrozenNorm
from nexus_cli.core.model.gpt_oss.engine.operators import routed_sum
from nexus_cli.core.model.gpt_oss.engine.policy import (
    Backend,
    describe,
    fast_grouped_mm,
    make_products,
    prefers_decoded,
    prefers_fused,
    resolve,
)
from nexus_cli.core.model.gpt_oss.engine.products import (
    Bf16Products,
    DecodedWeights,
    PackedWeights,
    Workspace,
)
from nexus_cli.core.model.gpt_oss.engine.sequence import SLIDING, Positions, make_positions
from nexus_cli.core.model.gpt_oss.engine.shared import SharedExpert

# Shape letters in this file: B sequences, S positions, T = B * S tokens, H hidden.


CHUNKS = 4  # in which a layer's experts are decoded where memory is short


@dataclass(frozen=True)
class EnginePlan:
    """What the engine does with micro-batches of one size.

    Attributes:
        experts: the backend, in words.
        activations: what is kept for the backward pass.
        graphs: whether the layers are replayed as CUDA graphs.
    """

    experts: str
    activations: ActivationPlan
    graphs: bool = False

    def describe(self) -> list[str]:
        """For people, a line a part."""
        how = ["layers: replayed as CUDA graphs"] if self.graphs else []
        return [self.experts, *self.activations.describe(), *how]


class Engine:
    """Runs a model's decoder layers through fused kernels, forward and backward.

    Args:
        config: the model's.
        layers: frozen tensors of each layer.
        packed: their experts as the checkpoint holds them.
        experts: the modules that hold those, for the model's own forward.
        backend: of the experts.
        workspace: that the layers decode into.
    """

    def __init__(
        self,
        config: Any,
        layers: Sequence[FrozenLayer],
        packed: Sequence[PackedWeights],
        experts: Sequence[Any],
        backend: Backend,
        workspace: Workspace | None = None,
    ) -> None:
        self.backend = backend
        self._config = config
        self._layers = list(layers)
        self._packed = list(packed)
        self._experts = list(experts)
        self._workspace = workspace or Workspace()
        self.kept: tuple[Kept, ...] = (EVERYTHING,) * len(layers)
        self.slow_grouped = False
        self._captured: tuple[int, int] | None = None
        self._accumulates = False
        self._graphs: dict[tuple[Any, ...], Any] = {}

    @property
    def waits_for_host(self) -> bool:
        """Whether a product reads row counts on the host, which no CUDA graph can."""
        return self.backend == "torch" or self._workspace.chunk is not None or self.slow_grouped

    @property
    def layer_bytes(self) -> LayerBytes:
        """What a layer can keep, in bytes a token."""
        config = self._config
        return LayerBytes.of(
            hidden=config.hidden_size,
            expert_width=config.intermediate_size,
            shared_width=config.shared_expert_intermediate_size if config.num_shared_experts else 0,
            top_k=config.num_experts_per_tok,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )

    def transient_bytes(self, tokens: int) -> int:
        """Peak of one layer's backward pass beyond what is kept, and the decoding buffer."""
        config = self._config
        rows = tokens * config.num_experts_per_tok
        routed = rows * 2 * (5 * config.intermediate_size + 2 * config.hidden_size)
        dense = tokens * 2 * (8 * config.hidden_size + 4 * config.intermediate_size)
        at_once = self._workspace.chunk or config.num_local_experts
        decoded = 2 * 2 * config.intermediate_size * config.hidden_size * at_once
        fused = self.backend in ("fused", "torch", "bf16") or (
            self.backend == "auto" and prefers_fused(rows, config.num_local_experts)
        )
        return int(routed + dense + (0 if fused else decoded))

    def plan_training(self, *, tokens: int, budget_bytes: int) -> EnginePlan:
        """Choose what micro-batches of ``tokens`` keep, and decode experts where memory is left.

        Args:
            tokens: positions of a micro-batch.
            budget_bytes: memory for what is kept and decoded, all else counted already.

        Raises:
            ValueError: not even the layers' inputs fit; the message has the numbers.
        """
        config, count = self._config, len(self._layers)
        self._workspace.chunk = None
        plan = self._plan_activations(tokens, budget_bytes)
        if plan is None or not all(kept.gate_up for kept in plan.kept):
            # Memory is short: decode a quarter of the experts at a time, and keep more for it.
            whole = self.transient_bytes(tokens)
            self._workspace.chunk = -(-config.num_local_experts // CHUNKS)
            saved = whole - self.transient_bytes(tokens)
            if not saved:  # nothing is decoded for so few rows
                self._workspace.chunk = None
            plan = self._plan_activations(tokens, budget_bytes + saved)
        if plan is None:
            need = count * self.layer_bytes.input * tokens
            raise ValueError(
                f"the inputs of {count} layers take {need / 2**30:.1f} GiB for {tokens:,} tokens, "
                f"and {max(budget_bytes, 0) / 2**30:.1f} GiB are left for them"
            )
        self.kept = plan.kept
        self.decode(plan.decoded_layers)
        words = describe(self.backend, tokens, config.num_experts_per_tok, config.num_local_experts)
        return EnginePlan(words, plan)

    def _plan_activations(self, tokens: int, budget_bytes: int) -> ActivationPlan | None:
        return plan_activations(
            self.layer_bytes,
            layers=len(self._layers),
            tokens=tokens,
            budget=budget_bytes,
            decoded_bytes_a_layer=self._decoding_bytes(tokens),
        )

    def plan_forward(self, *, tokens: int, budget_bytes: int) -> str:
        """Decode experts where memory is left, for passes of ``tokens`` without gradients.

        Args:
            tokens: positions of the largest batch.
            budget_bytes: memory for decoded experts, all else counted already.

        Returns:
            What was decided, for people.
        """
        config, cost = self._config, self._decoding_bytes(tokens)
        count = min(len(self._layers), max(budget_bytes, 0) // cost) if cost else 0
        self.decode(count)
        words = describe(self.backend, tokens, config.num_experts_per_tok, config.num_local_experts)
        return f"{words}; kept decoded: {count} of {len(self._layers)} layers"

    def _decoding_bytes(self, tokens: int) -> int:
        """What a decoded layer takes beyond its packed form; 0 if it is no faster."""
        config = self._config
        rows = tokens * config.num_experts_per_tok
        if self.backend != "auto" or not prefers_decoded(rows, config.num_local_experts):
            return 0
        numbers = 3 * config.intermediate_size * config.hidden_size * config.num_local_experts
        return int(numbers * 2 - numbers * 17 // 32)

    def observe(self, observers: Sequence[Any]) -> None:
        """Show each layer's activations to its observer; see ``observe.py``."""
        self._layers = [
            replace(layer, block=replace(layer.block, observer=observer))
            for layer, observer in zip(self._layers, observers, strict=True)
        ]

    def decoded_down(self, index: int) -> Tensor | None:
        """A layer's down projections ``[E, H, I]``, bf16, if it is kept decoded."""
        products = self._layers[index].block.products
        return products.decoded.down_ENK if isinstance(products, Bf16Products) else None

    def recompute(self) -> None:
        """Keep nothing but each layer's input."""
        self.kept = (NOTHING,) * len(self._layers)

    def decode(self, count: int) -> None:
        """Hold the first ``count`` layers' experts in bf16, in place of the packed form."""
        for index in range(count):
            layer = self._layers[index]
            if isinstance(layer.block.products, Bf16Products):
                continue
            with on_device_of(self._packed[index].gate_up_blocks):
                decoded = DecodedWeights.of(self._packed[index])
            _free(self._packed[index])
            block = replace(layer.block, products=Bf16Products(decoded))
            self._layers[index] = replace(layer, block=block)
            self._experts[index].decoded = partial(routed_sum, block)

    def run(
        self,
        model: Any,
        x_BSH: Tensor,
        position_ids_BS: Tensor,
        *,
        shared_experts: bool,
        output_router_logits: bool,
    ) -> MoeModelOutputWithPast:
        """All layers and the final norm; the same as the model's own forward without a cache.

        Args:
            model: the :class:`NexusGptOssModel`; routers and shared experts are read from it now,
                so that parameters swapped for a call are seen.
            x_BSH: embedded tokens.
            position_ids_BS: positions; where they restart at 0 a document begins.
            shared_experts: ``False`` leaves them out.
            output_router_logits: return every layer's ``[T, E]``.
        """
        with on_device_of(x_BSH):
            normed, logits = self._run(model, x_BSH, position_ids_BS, shared_experts=shared_experts)
        return MoeModelOutputWithPast(
            last_hidden_state=normed.view_as(x_BSH),
            router_logits=tuple(logits) if output_router_logits else None,  # type: ignore[arg-type]
        )

    def _run(
        self, model: Any, x_BSH: Tensor, position_ids_BS: Tensor, *, shared_experts: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The final norm's output ``[T, H]`` and the routers' logits, launched or replayed."""
        batch, length, _ = x_BSH.shape
        parameters = trainable_tensors(model, shared_experts=shared_experts)
        needs = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        positions = make_positions(
            model.rotary_emb,
            position_ids_BS.expand(batch, length),
            self._config.layer_types,
            self._config.sliding_window,
            dtype=x_BSH.dtype,
            needs_backward=needs,
        )
        x_TH = x_BSH.reshape(batch * length, -1)

        def stack(tensors: Sequence[Tensor], places: Sequence[Tensor]) -> tuple[Tensor, ...]:
            here = positions.with_tensors(tensors[1:])
            return self._run_layers(model.norm, tensors[0], here, places)

        inputs = [x_TH, *positions.tensors]
        if self._captured != (batch, length) or x_TH.requires_grad:
            normed, *logits = stack(inputs, parameters)
        elif needs:
            normed, *logits = self._training_graph(stack, inputs, parameters).run(inputs)
        else:
            normed, *logits = self._forward_graph(stack, inputs, parameters).run(inputs)
        return normed, logits

    def capture(self, batch: int, length: int, *, accumulates: bool) -> None:
        """Run micro-batches of this one shape as CUDA graphs from now on.

        Args:
            batch: sequences.
            length: positions of each.
            accumulates: whether gradients of several micro-batches are summed.
        """
        self._captured, self._accumulates = (batch, length), accumulates
        self._graphs.clear()

    def _training_graph(
        self, stack: Stack, inputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> TrainingGraph:
        key = ("train", *(p.data_ptr() for p in parameters))
        if key not in self._graphs:
            self._graphs[key] = TrainingGraph(stack, inputs, parameters, copies=self._accumulates)
        graph: TrainingGraph = self._graphs[key]
        return graph

    def _forward_graph(
        self, stack: Stack, inputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> ForwardGraph:
        key = ("forward", *(p.data_ptr() for p in parameters))
        if key not in self._graphs:
            self._graphs[key] = ForwardGraph(stack, inputs, parameters)
        graph: ForwardGraph = self._graphs[key]
        return graph

    def _run_layers(
        self, norm: Any, x_TH: Tensor, positions: Positions, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The final norm's output ``[T, H]``, and every router's logits ``[T, E]``."""
        logits: list[Tensor] = []
        each = len(parameters) // len(self._layers)
        for index, (frozen, kept) in enumerate(zip(self._layers, self.kept, strict=True)):
            weight, bias, *expert = parameters[index * each : (index + 1) * each]
            shared = SharedExpert(*expert) if expert else None
            x_TH, logits_TE = decoder_layer(frozen, positions, kept, x_TH, (weight, bias), shared)
            logits.append(logits_TE)
        normed: Tensor = FrozenNorm.apply(x_TH, norm.weight, norm.variance_epsilon)
        return normed, *logits


def trainable_tensors(model: Any, *, shared_experts: bool) -> list[Tensor]:
    """What may train, layer by layer: the router's two tensors, and seven of a shared expert."""
    found: list[Tensor] = []
    for module in model.layers:
        found += [module.mlp.router.weight, module.mlp.router.bias]
        shared = shared_tensors(module.mlp) if shared_experts else None
        found += shared.tensors if shared is not None else ()
    return found


def attach_engine(model: Any, *, experts_backend: Backend = "auto") -> Engine:
    """Make a loaded model run its layers through the engine, wherever no cache is asked for.

    Args:
        model: a :class:`NexusGptOssForCausalLM` in evaluation mode, its frozen weights on one
            device and in one dtype: bf16 on CUDA. With the backend ``torch`` any device and dtype
            will do, for tests.
        experts_backend: see ``policy.py``.

    Raises:
        ValueError: the model's device or dtype is none that the backend runs on.
    """
    weight = model.lm_head.weight
    if experts_backend != "torch" and (weight.device.type, weight.dtype) != (
        "cuda",
        torch.bfloat16,
    ):
        raise ValueError(
            f"the experts' backend {experts_backend} runs in bfloat16 on a CUDA device, not in "
            f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
        )
    experts_backend = resolve(experts_backend, weight.device)
    workspace = Workspace()
    packed = [_packed(layer.mlp.experts) for layer in model.model.layers]
    layers = [
        _frozen_layer(layer, model.config, kind, weights, experts_backend, workspace)
        for layer, kind, weights in zip(
            model.model.layers, model.config.layer_types, packed, strict=True
        )
    ]
    experts = [layer.mlp.experts for layer in model.model.layers]
    engine = Engine(model.config, layers, packed, experts, experts_backend, workspace)
    grouped = experts_backend in ("dequant", "bf16")
    engine.slow_grouped = grouped and not fast_grouped_mm(weight.device)
    if experts_backend == "bf16":
        engine.decode(len(layers))
    else:
        for module in experts:
            module.backend = experts_backend
    model.model.engine = engine
    return engine


def shared_tensors(moe: Any) -> SharedExpert | None:
    """The tensors of a block's shared expert, if it has one."""
    if not hasattr(moe, "shared_expert"):
        return None
    expert = moe.shared_expert
    return SharedExpert(
        expert.gate_proj.weight,
        expert.gate_proj.bias,
        expert.up_proj.weight,
        expert.up_proj.bias,
        expert.down_proj.weight,
        expert.down_proj.bias,
        expert.output_gate,
    )


def _packed(experts: Any) -> PackedWeights:
    """A module's weights, their scales put into the order that the kernels read fastest."""
    scales = (experts.gate_up_proj_scales, experts.down_proj_scales)
    for parameter in scales:
        parameter.data = order_scales(parameter.data)
    return PackedWeights(
        experts.gate_up_proj_blocks,
        experts.gate_up_proj_scales,
        experts.gate_up_proj_bias,
        experts.down_proj_blocks,
        experts.down_proj_scales,
        experts.down_proj_bias,
        experts.limit,
        small_scales=all(int(parameter.max()) <= 128 for parameter in scales),
    )


def _free(weights: PackedWeights) -> None:
    """Give back the packed bytes; whoever still wanted them meets an empty tensor, not old ones."""
    for tensor in (*weights.gate_up, *weights.down):
        tensor.data = tensor.data.new_empty(0)


def _frozen_layer(
    module: Any,
    config: Any,
    kind: str,
    weights: PackedWeights,
    backend: Backend,
    workspace: Workspace,
) -> FrozenLayer:
    attention = module.self_attn
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    return FrozenLayer(
        kind=kind,
        window=config.sliding_window if kind == SLIDING else None,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        epsilon=module.input_layernorm.variance_epsilon,
        top_k=config.num_experts_per_tok,
        input_norm=module.input_layernorm.weight,
        mlp_norm=module.post_attention_layernorm.weight,
        qkv_weight=_join([linear.weight for linear in qkv]),
        qkv_bias=_join([linear.bias for linear in qkv]),
        out_weight=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        sinks=attention.sinks,
        block=RoutedBlock.of(weights, make_products(backend, weights, workspace)),
    )


def _join(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One tensor under the other, in one piece of memory that the parameters become views of."""
    whole = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + len(parameter)]
        start += len(parameter)
    return whole
