"""Rows times the packed weights of each row's own expert, decoded inside the product."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_cli.core.kernels.mxfp4_decode import decode_into_torch, require_scale_order

# Shape letters in this file: E experts, N output features, K input features, R rows sorted by
# expert.


def matmul_rows(
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    offsets_E: Tensor,
    row_index_R: Tensor | None,
    *,
    small_scales: bool = False,
) -> Tensor:
    """``y[r] = W[expert of r] x[row_index[r]]``, accumulated in float32.

    Args:
        x: ``[*, K]``, contiguous; bf16 on a GPU.
        blocks: uint8 ``[E, N, K/32, 16]``.
        scales: uint8 ``[E, N, K/32]``; fastest in the order of
            :func:`~nexus_cli.core.kernels.mxfp4_decode.order_scales`.
        offsets_E: int32, the row after each expert's last, on the device: no host ever waits.
        row_index_R: int32, the row of ``x`` for each row of the result; ``None`` for the rows as
            they are.
        small_scales: whether every scale byte is known to be at most 128; decoding is cheaper then.

    Returns:
        ``[R, N]`` in the dtype of ``x``.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit together.
    """
    _check(x, blocks, scales, offsets_E, row_index_R, features=blocks.shape[2] * 32)
    if not x.is_cuda:
        return matmul_rows_torch(x, blocks, scales, offsets_E, row_index_R)
    from nexus_cli.core.kernels.triton import mxfp4_matmul as kernels

    return kernels.matmul_rows(
        x, blocks, scales, offsets_E, row_index_R, transposed=False, small_scales=small_scales
    )


def matmul_rows_transposed(
    grad: Tensor,
    blocks: Tensor,
    scales: Tensor,
    offsets_E: Tensor,
    row_index_R: Tensor | None,
    *,
    small_scales: bool = False,
) -> Tensor:
    """``y[r] = W[expert of r]^T grad[row_index[r]]``: the input gradient of :func:`matmul_rows`.

    Args:
        grad: ``[*, N]``; the rest as in :func:`matmul_rows`.
        blocks: uint8 ``[E, N, K/32, 16]``.
        scales: uint8 ``[E, N, K/32]``.
        offsets_E: int32.
        row_index_R: int32 or ``None``.
        small_scales: whether every scale byte is at most 128.

    Returns:
        ``[R, K]`` in the dtype of ``grad``.
    """
    _check(grad, blocks, scales, offsets_E, row_index_R, features=blocks.shape[1])
    if not grad.is_cuda:
        return matmul_rows_transposed_torch(grad, blocks, scales, offsets_E, row_index_R)
    from nexus_cli.core.kernels.triton import mxfp4_matmul as kernels

    return kernels.matmul_rows(
        grad, blocks, scales, offsets_E, row_index_R, transposed=True, small_scales=small_scales
    )


def matmul_rows_torch(
    x: Tensor, blocks: Tensor, scales: Tensor, offsets_E: Tensor, row_index_R: Tensor | None
) -> Tensor:
    """:func:`matmul_rows` in PyTorch, expert by expert, on any device and in any float dtype."""
    return _each_expert(x, blocks, scales, offsets_E, row_index_R, transposed=False)


def matmul_rows_transposed_torch(
    grad: Tensor, blocks: Tensor, scales: Tensor, offsets_E: Tensor, row_index_R: Tensor | None
) -> Tensor:
    """:func:`matmul_rows_transposed` in PyTorch."""
    return _each_expert(grad, blocks, scales, offsets_E, row_index_R, transposed=True)


def _each_expert(
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    offsets_E: Tensor,
    row_index_R: Tensor | None,
    *,
    transposed: bool,
) -> Tensor:
    rows = x if row_index_R is None else x.index_select(0, row_index_R)
    outputs, inputs = blocks.shape[1], blocks.shape[2] * 32
    y = rows.new_empty(len(rows), inputs if transposed else outputs)
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            one = slice(expert, expert + 1)
            weight_NK = rows.new_empty(outputs, inputs)
            decode_into_torch(blocks[one], scales[one], weight_NK[None])
            y[start:end] = rows[start:end] @ (weight_NK if transposed else weight_NK.T)
        start = end
    return y


def _check(
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    offsets_E: Tensor,
    row_index_R: Tensor | None,
    *,
    features: int,
) -> None:
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"packed weights are uint8, not {blocks.dtype} and {scales.dtype}")
    if blocks.ndim != 4 or blocks.shape[-1] != 16 or scales.shape != blocks.shape[:-1]:
        raise ValueError(f"blocks {tuple(blocks.shape)} do not fit scales {tuple(scales.shape)}")
    if x.ndim != 2 or x.shape[1] != features:
        raise ValueError(f"rows {tuple(x.shape)} where {features} features are due")
    require_scale_order(scales)
    if offsets_E.shape != (len(blocks),) or offsets_E.dtype != torch.int32:
        raise ValueError("the offsets are one int32 an expert")
    if row_index_R is not None and row_index_R.dtype != torch.int32:
        raise ValueError(f"row indices are int32, not {row_index_R.dtype}")
    if not x.is_contiguous():
        raise ValueError("the rows must be contiguous")
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise ValueError(f"a GPU takes bfloat16 rows, not {x.dtype}")
