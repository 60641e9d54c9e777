"""Random models of GPT-OSS's shapes, filled on the device: stock transformers', and ours.

Both hold the same numbers. A tensor's seed is its name, and stock's dense experts are the decoded
values of the packed bytes that ours holds, as in a real checkpoint: so routing is the same, and so
is what the values cost the card in power.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from shapes import BatchShape, ModelShape
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, GptOssForCausalLM

from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import (
    NexusGptOssConfig,
    NexusGptOssForCausalLM,
    dequantize_mxfp4,
)

INITIAL_STD = 0.02
OUTPUT_GATE = 0.2  # not 0, which would make the shared expert's gradients zeros


class DenseShared(nn.Module):
    """What a user of stock transformers would put beside the experts: GPT-OSS's clamped SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape as the input."""
        gate = self.gate(x).clamp(max=7.0)
        up = self.up(x).clamp(-7.0, 7.0)
        return self.down((up + 1) * (gate * torch.sigmoid(1.702 * gate)))


class WithShared(nn.Module):
    """Stock's sparse block with a dense expert beside it."""

    def __init__(self, mlp: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.shared = shared

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and the router's scores."""
        y, scores = self.mlp(x)
        return y + self.shared(x), scores


def stock_model(
    shape: ModelShape, layers: int, device: torch.device, *, shared: bool, skew: float = 0.0
) -> GptOssForCausalLM:
    """Stock in bf16 with flex attention and ``grouped_mm`` experts, frozen but the dense experts.

    Args:
        shape: of the model.
        layers: how many of them.
        device: without a GPU, attention is the eager one: flex has no backward pass there.
        shared: put a trainable bf16 expert beside the frozen ones.
        skew: see :func:`fill`.
    """
    config = GptOssConfig(**shape.config(layers))
    config.use_cache = False
    config._attn_implementation = "flex_attention" if device.type == "cuda" else "eager"
    config._experts_implementation = "grouped_mm"
    with _bf16(), torch.device("meta"):
        model = GptOssForCausalLM(config)
    _materialise(model, device, skew)
    if shared:
        for index, layer in enumerate(model.model.layers):
            with _bf16(), torch.device(device):
                dense = DenseShared(config.hidden_size, config.intermediate_size)
            for name, parameter in dense.named_parameters():
                fill(f"model.layers.{index}.shared.{name}", parameter, skew)
                parameter.requires_grad_(True)
            layer.mlp = WithShared(layer.mlp, dense)
    return model


def nexus_model(
    shape: ModelShape, layers: int, device: torch.device, *, shared: bool, skew: float = 0.0
) -> NexusGptOssForCausalLM:
    """Ours in bf16 with packed experts, all frozen, in evaluation mode.

    Args:
        shape: of the model.
        layers: how many of them.
        device: that it is made on.
        shared: whether it has shared experts.
        skew: see :func:`fill`.
    """
    config = NexusGptOssConfig(**shape.config(layers), num_shared_experts=int(shared))
    config.use_cache = False
    config._attn_implementation = "eager"
    with _bf16(), torch.device("meta"):
        model = NexusGptOssForCausalLM(config)
    _materialise(model, device, skew)
    return model.eval()


def recompute_first(model: GptOssForCausalLM, count: int) -> None:
    """Let the first ``count`` layers run again in the backward pass.

    The first ones, because by then the kept activations of the others are freed again.
    """
    model.train()
    for layer in model.model.layers[:count]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def compile_layers(model: GptOssForCausalLM) -> None:
    """``torch.compile`` on every decoder layer, with room for a graph of each."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile()


def random_ids(batch: BatchShape, vocabulary: int, device: torch.device) -> Tensor:
    """Token ids ``[B, S]``, the same in every process."""
    generator = torch.Generator(device).manual_seed(0)
    size = (batch.batch, batch.length)
    return torch.randint(0, vocabulary, size, generator=generator, device=device)


@torch.no_grad()
def fill(name: str, tensor: Tensor, skew: float) -> None:
    """Random values in place, from a seed that is the name.

    Embeddings are of size 1, so that tokens stay apart and routing is near uniform.

    Args:
        name: of the tensor in the checkpoint; decides the distribution.
        tensor: on any device.
        skew: standard deviation of the router's biases. Its logits' own is about 1: at 0 the
            busiest of 32 experts has 1.3 to 1.7 times the rows of the mean, at 1 four to seven.
    """
    generator = _generator(name, tensor.device)
    if name.endswith("_blocks"):
        tensor.random_(0, 256, generator=generator)
    elif name.endswith("_scales"):
        tensor.random_(119, 123, generator=generator)
    elif name.endswith((".gate_up_proj", ".down_proj")):  # stock's dense experts
        _fill_decoded(name, tensor)
    elif name.endswith("output_gate"):
        tensor.fill_(OUTPUT_GATE)
    elif name.endswith("norm.weight"):
        tensor.normal_(1.0, 0.1, generator=generator)
    elif name.endswith(("sinks", "embed_tokens.weight")):
        tensor.normal_(0.0, 1.0, generator=generator)
    elif name.endswith("router.bias"):
        tensor.normal_(0.0, 1.0, generator=generator).mul_(skew)
    elif name.endswith("bias"):
        tensor.normal_(0.0, 0.1, generator=generator)
    else:
        tensor.normal_(0.0, INITIAL_STD, generator=generator)


def _fill_decoded(name: str, tensor: Tensor) -> None:
    """``[E, in, out]``: the packed bytes of the same name, decoded and transposed."""
    experts, inputs, outputs = tensor.shape
    packed = {"dtype": torch.uint8, "device": tensor.device}
    blocks = torch.empty(experts, outputs, inputs // 32, 16, **packed)
    scales = torch.empty(experts, outputs, inputs // 32, **packed)
    fill(f"{name}_blocks", blocks, 0.0)
    fill(f"{name}_scales", scales, 0.0)
    for expert in range(experts):
        tensor[expert] = dequantize_mxfp4(blocks[expert], scales[expert], tensor.dtype).T


def _materialise(model: nn.Module, device: torch.device, skew: float) -> None:
    model.to_empty(device=device)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        fill(name, parameter, skew)
    # The angles are no parameters, and to_empty left them without values.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


def _generator(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


@contextmanager
def _bf16() -> Iterator[None]:
    """New floating parameters are bf16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
