"""A shared expert made of whole hidden units of routed experts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from nexus_cli.core.model.gpt_oss.initialise import empty_expert
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4
from nexus_cli.core.model.gpt_oss.mxfp4 import decode_columns
from nexus_cli.core.model.gpt_oss.slices import ExpertReader, ExpertWeights

# Shape letters in this file: H hidden, U chosen units of one expert.


def read_units(
    reader: ExpertReader,
    layer: int,
    units: Mapping[int, NDArray[np.int64]],
    *,
    column_scale: Mapping[int, float],
    bias_scale: Mapping[int, float],
) -> ExpertWeights:
    """Put chosen units side by side, expert after expert; each keeps its rows, biases and column.

    Args:
        reader: of the model's experts.
        layer: whose experts they are.
        units: for each expert, indices of its units; only these experts are read.
        column_scale: by expert; its units' down columns are multiplied with it.
        bias_scale: by expert; the down bias is the sum of the experts' own, so multiplied.

    Raises:
        ArtifactError: a shard cannot be read.
    """
    made = empty_expert(reader.shape.hidden_size, sum(map(len, units.values())))
    made.down_bias_H.zero_()
    places = [(layer, expert) for expert in units]
    begin = 0
    for (expert, chosen), packed in zip(units.items(), reader.stream(places), strict=True):
        units_U = torch.from_numpy(chosen)
        rows = torch.stack((2 * units_U, 2 * units_U + 1), dim=1).reshape(-1)
        gate_up = dequantize_mxfp4(
            packed["gate_up_proj_blocks"][rows], packed["gate_up_proj_scales"][rows], torch.float32
        )
        down_HU = decode_columns(packed["down_proj_blocks"], packed["down_proj_scales"], units_U)
        place = slice(begin, begin + len(units_U))
        made.gate_IH[place], made.up_IH[place] = gate_up[0::2], gate_up[1::2]
        bias = packed["gate_up_proj_bias"][rows].float()
        made.gate_bias_I[place], made.up_bias_I[place] = bias[0::2], bias[1::2]
        made.down_HI[:, place] = column_scale[expert] * down_HU
        made.down_bias_H.add_(packed["down_proj_bias"].float(), alpha=bias_scale[expert])
        begin = place.stop
    return made
