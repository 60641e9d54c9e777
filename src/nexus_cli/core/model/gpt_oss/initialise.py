"""Where a shared expert starts: from routed experts or at random, and how open its gate is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from nexus_cli.core.model.gpt_oss.slices import ExpertReader, ExpertSum, ExpertWeights, row_workers

# Shape letters in this file: H hidden, I width of the shared expert, U of a routed one, E experts.

INITIAL_STD = 0.02


def empty_expert(hidden_size: int, width: int) -> ExpertWeights:
    """Weights of no particular values, on torch's default device."""
    return ExpertWeights(
        gate_IH=torch.empty(width, hidden_size),
        gate_bias_I=torch.empty(width),
        up_IH=torch.empty(width, hidden_size),
        up_bias_I=torch.empty(width),
        down_HI=torch.empty(hidden_size, width),
        down_bias_H=torch.empty(hidden_size),
    )


def random_expert(hidden_size: int, width: int, generator: Generator) -> ExpertWeights:
    """Weights from N(0, 0.02), biases zero."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * INITIAL_STD

    return ExpertWeights(
        gate_IH=normal(width, hidden_size),
        gate_bias_I=torch.zeros(width),
        up_IH=normal(width, hidden_size),
        up_bias_I=torch.zeros(width),
        down_HI=normal(hidden_size, width),
        down_bias_H=torch.zeros(hidden_size),
    )


def read_average(reader: ExpertReader, places: Sequence[tuple[int, int]]) -> ExpertWeights:
    """The mean of each tensor over experts at ``(layer, expert)``, summed one by one in float32.

    Hidden units of different experts need not correspond, so their mean may be far from any
    of them; that is what the original does.

    Raises:
        ArtifactError: a shard cannot be read.
        ValueError: ``places`` is empty.
    """
    total = ExpertSum(reader.shape.intermediate_size, reader.shape.hidden_size)
    with row_workers() as workers:
        for packed in reader.stream(places):
            total.add(packed, workers)
    return total.mean()


def fit_width(expert: ExpertWeights, width: int, generator: Generator) -> ExpertWeights:
    """Narrow to the units that can contribute most, or widen with units that say nothing yet.

    A unit's reach is the product of the norms of its gate row, up row and down column. Units
    added beyond an expert's width are random inside and zero in the down projection, so they
    do not change the output but have a gradient.
    """
    units, hidden = expert.gate_IH.shape
    if width == units:
        return expert
    if width < units:
        reach_U = expert.gate_IH.norm(dim=1) * expert.up_IH.norm(dim=1) * expert.down_HI.norm(dim=0)
        kept = reach_U.topk(width).indices.sort().values
        return ExpertWeights(
            gate_IH=expert.gate_IH[kept],
            gate_bias_I=expert.gate_bias_I[kept],
            up_IH=expert.up_IH[kept],
            up_bias_I=expert.up_bias_I[kept],
            down_HI=expert.down_HI[:, kept],
            down_bias_H=expert.down_bias_H,
        )
    more = random_expert(hidden, width - units, generator)
    return ExpertWeights(
        gate_IH=torch.cat((expert.gate_IH, more.gate_IH)),
        gate_bias_I=torch.cat((expert.gate_bias_I, more.gate_bias_I)),
        up_IH=torch.cat((expert.up_IH, more.up_IH)),
        up_bias_I=torch.cat((expert.up_bias_I, more.up_bias_I)),
        down_HI=torch.cat((expert.down_HI, torch.zeros_like(more.down_HI)), dim=1),
        down_bias_H=expert.down_bias_H,
    )


def shared_expert_tensors(
    layer: int, expert: ExpertWeights, *, start: str, output_scale: float, dtype: torch.dtype
) -> Mapping[str, Tensor]:
    """The tensors of one layer's shared expert under their names in the checkpoint.

    Args:
        layer: index of the layer.
        expert: its weights, float32.
        start: ``gate`` (g = 0), ``zero-down`` (g = 1, down projection zero) or ``scaled``
            (g = ``output_scale``).
        output_scale: the gate of ``scaled``.
        dtype: of the weights; the gate is always float32.
    """
    gates = {"gate": 0.0, "zero-down": 1.0, "scaled": output_scale}
    if start not in gates:
        raise ValueError(f"unknown start {start!r}")
    down, down_bias = expert.down_HI, expert.down_bias_H
    if start == "zero-down":
        down, down_bias = torch.zeros_like(down), torch.zeros_like(down_bias)
    prefix = f"model.layers.{layer}.mlp.shared_expert."
    weights = {
        "gate_proj.weight": expert.gate_IH,
        "gate_proj.bias": expert.gate_bias_I,
        "up_proj.weight": expert.up_IH,
        "up_proj.bias": expert.up_bias_I,
        "down_proj.weight": down,
        "down_proj.bias": down_bias,
    }
    stored = {prefix + name: tensor.to(dtype) for name, tensor in weights.items()}
    return stored | {prefix + "output_gate": torch.tensor([gates[start]], dtype=torch.float32)}
