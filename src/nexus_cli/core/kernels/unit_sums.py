"""What every expert's hidden units say over many rows: a weighted sum of magnitudes."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_cli.core.kernels.placement import on_gpu

# Shape letters in this file: R routed rows sorted by expert, N of one expert, E experts, I expert
# width.


def add_unit_sums_(
    sum_EI: Tensor, hidden_RI: Tensor, weight_R: Tensor, offsets_E: Tensor, scale_EI: Tensor
) -> Tensor:
    """``sum[e, i] += scale[e, i] sum_r weight_r |hidden[r, i]|`` over expert ``e``'s rows.

    Rows are added in their order, in float32 within a call and in float64 across calls; nothing
    waits for the host.

    Args:
        sum_EI: float64, contiguous.
        hidden_RI: the experts' activations, any float dtype, contiguous.
        weight_R: of each row, float32; 0 leaves a row out.
        offsets_E: the row after each expert's last, int32.
        scale_EI: of each unit, float32.

    Returns:
        ``sum_EI``, changed in place.

    Raises:
        ValueError: if shapes, devices or strides do not fit.
    """
    (rows, width), experts = hidden_RI.shape, len(offsets_E)
    if {sum_EI.shape, scale_EI.shape} != {(experts, width)} or weight_R.shape != (rows,):
        raise ValueError(
            f"sums {tuple(sum_EI.shape)}, scales {tuple(scale_EI.shape)} and weights "
            f"{tuple(weight_R.shape)} for {rows} rows of {width} units of {experts} experts"
        )
    if on_gpu(hidden_RI, sum_EI, weight_R, offsets_E, scale_EI):
        from nexus_cli.core.kernels.triton import unit_sums as kernels

        return kernels.add_unit_sums_(sum_EI, hidden_RI, weight_R, offsets_E, scale_EI)
    return add_unit_sums_torch_(sum_EI, hidden_RI, weight_R, offsets_E, scale_EI)


def add_unit_sums_torch_(
    sum_EI: Tensor, hidden_RI: Tensor, weight_R: Tensor, offsets_E: Tensor, scale_EI: Tensor
) -> Tensor:
    """:func:`add_unit_sums_` in PyTorch, on any device; reads the offsets on the host."""
    begin = 0
    for expert, end in enumerate(offsets_E.tolist()):
        rows = slice(begin, end)
        add_expert_(sum_EI[expert], hidden_RI[rows], weight_R[rows], scale_EI[expert])
        begin = end
    return sum_EI


def add_expert_(sum_I: Tensor, hidden_NI: Tensor, weight_N: Tensor, scale_I: Tensor) -> None:
    """The sum of one expert, over its rows alone, in PyTorch, on any device."""
    dtype = torch.promote_types(hidden_NI.dtype, torch.float32)
    sum_I += weight_N.to(dtype) @ hidden_NI.to(dtype).abs() * scale_I
