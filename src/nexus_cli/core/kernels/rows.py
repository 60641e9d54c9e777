"""Routed rows from tokens and back: a copy of each, and a weighted sum without atomics."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_cli.core.kernels.placement import on_gpu
from nexus_cli.core.kernels.routing import Routing

# Shape letters in this file: T tokens, K experts a token, R routed rows, E experts, H hidden.


def spread_rows(x_TH: Tensor, routing: Routing) -> Tensor:
    """Each routed row's token ``[R, H]``: a token is read once and written to its K places.

    Args:
        x_TH: contiguous.
        routing: which rows are a token's.

    Raises:
        ValueError: if the tensors are on different devices or strided.
    """
    if on_gpu(x_TH, routing.row_TK):
        from nexus_cli.core.kernels.triton import rows as kernels

        return kernels.spread_rows(x_TH, routing.row_TK)
    return spread_rows_torch(x_TH, routing)


def spread_rows_torch(x_TH: Tensor, routing: Routing) -> Tensor:
    """:func:`spread_rows` in PyTorch, on any device."""
    return x_TH.index_select(0, routing.token_R)


def combine_rows(
    rows_RH: Tensor,
    routing: Routing,
    *,
    scores_TK: Tensor | None = None,
    experts_TK: Tensor | None = None,
    bias_EH: Tensor | None = None,
    residual_TH: Tensor | None = None,
    shared_TH: Tensor | None = None,
    shared_bias_H: Tensor | None = None,
    shared_scale: Tensor | None = None,
) -> Tensor:
    """``residual + sum_k score_k (row_k + bias_k) + shared_scale (shared + shared_bias)``.

    What is absent is left out: scores and scale are then 1, the rest 0. The sum is in float32,
    its terms always in the same order, and rounded once.

    Args:
        rows_RH: the experts' outputs or input gradients, sorted by expert, contiguous.
        routing: which rows are a token's.
        scores_TK: weight of each of a token's rows, any float dtype.
        experts_TK: of each of a token's rows, int32; needed with ``bias_EH``.
        bias_EH: of each expert, any float dtype.
        residual_TH: any float dtype.
        shared_TH: the shared expert's output, any float dtype.
        shared_bias_H: of the shared expert, any float dtype.
        shared_scale: one element on the device of the rows.

    Returns:
        ``[T, H]`` in the dtype of ``rows_RH``.

    Raises:
        ValueError: if shapes, devices or strides do not fit, or a part lacks its partner.
    """
    tokens, top_k = routing.row_TK.shape
    hidden = rows_RH.shape[1]
    if (bias_EH is None) != (experts_TK is None):
        raise ValueError("the experts' biases and the experts come together")
    if shared_TH is None and not (shared_bias_H is None and shared_scale is None):
        raise ValueError("a shared bias or scale without a shared output")
    expected = (
        (rows_RH, (tokens * top_k, hidden)),
        (scores_TK, (tokens, top_k)),
        (experts_TK, (tokens, top_k)),
        (residual_TH, (tokens, hidden)),
        (shared_TH, (tokens, hidden)),
        (shared_bias_H, (hidden,)),
    )
    for tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"a tensor {tuple(tensor.shape)} where {shape} is due")
    parts = (scores_TK, experts_TK, bias_EH, residual_TH, shared_TH, shared_bias_H, shared_scale)
    if on_gpu(rows_RH, routing.row_TK, *(part for part in parts if part is not None)):
        from nexus_cli.core.kernels.triton import rows as kernels

        return kernels.combine_rows(rows_RH, routing.row_TK, *parts)
    return combine_rows_torch(rows_RH, routing.row_TK, *parts)


def combine_rows_torch(
    rows_RH: Tensor,
    row_TK: Tensor,
    scores_TK: Tensor | None = None,
    experts_TK: Tensor | None = None,
    bias_EH: Tensor | None = None,
    residual_TH: Tensor | None = None,
    shared_TH: Tensor | None = None,
    shared_bias_H: Tensor | None = None,
    shared_scale: Tensor | None = None,
) -> Tensor:
    """:func:`combine_rows` in PyTorch, on any device; takes the routing's ``row_TK``."""
    dtype = torch.promote_types(rows_RH.dtype, torch.float32)
    terms_TKH = rows_RH[row_TK.long()].to(dtype)
    if bias_EH is not None and experts_TK is not None:
        terms_TKH = terms_TKH + bias_EH.to(dtype)[experts_TK.long()]
    if scores_TK is not None:
        terms_TKH = terms_TKH * scores_TK.to(dtype)[:, :, None]
    out_TH = terms_TKH.sum(1)
    if residual_TH is not None:
        out_TH = out_TH + residual_TH.to(dtype)
    if shared_TH is not None:
        shared = shared_TH.to(dtype)
        if shared_bias_H is not None:
            shared = shared + shared_bias_H.to(dtype)
        if shared_scale is not None:
            shared = shared * shared_scale.to(dtype).reshape(())
        out_TH = out_TH + shared
    return out_TH.to(rows_RH.dtype)
