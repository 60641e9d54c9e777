"""Clamped SwiGLU and its gradient: one row a program, all of it read before it is used."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nexus_cli.core.kernels.swiglu import ALPHA

# Shape letters in this file: T tokens, R routed rows, I expert width, E experts.

PIECE = 1024  # activations
# Activations a warp: 8 values of bfloat16 a thread. A thread's 16 bytes of a routed piece are
# gate and up of the very activations it handles, so nothing moves between warps. With more warps
# than values, two would share some, and the gradient in place would race.
ROUTED_WARP = 128
DENSE_WARP = 256

_ALPHA = tl.constexpr(ALPHA)
_EXPONENT = tl.constexpr(-ALPHA * math.log2(math.e))


@triton.jit
def _held(gate, up, limit):
    """Clamped values, and the gate's sigmoid. NaN stays NaN, so that it is noticed."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    return gate, up, 1.0 / (1.0 + tl.exp2(_EXPONENT * gate))


@triton.jit
def _through(grad, factor, gate, up, limit):
    """The activation, and what ``factor * grad`` becomes at gate and up.

    It passes where a value is inside or on its limit, or NaN.
    """
    held_gate, held_up, sigmoid = _held(gate, up, limit)
    gated = held_gate * sigmoid
    slope = _ALPHA * gated * (1.0 - sigmoid) + sigmoid
    scaled = grad * factor
    grad_gate = tl.where(gate > limit, 0.0, scaled * (held_up + 1.0) * slope)
    grad_up = tl.where(tl.abs(up) > limit, 0.0, scaled * gated)
    return (held_up + 1.0) * gated, grad_gate, grad_up


@triton.jit
def _read(pointer, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    return tl.load(pointer + columns, columns < WIDTH, 0.0)


@triton.jit
def _read_row(pointer, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pieces of a row, all under way before the first is used: one wait for memory a row."""
    pieces = ()
    for start in tl.static_range(0, WIDTH, BLOCK):
        pieces += (_read(pointer, start, WIDTH, BLOCK),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _write(pointer, start, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    tl.store(pointer + columns, value.to(pointer.dtype.element_ty), columns < WIDTH)


@triton.jit
def _split(pairs, BLOCK: tl.constexpr):
    return tl.split(tl.reshape(pairs.to(tl.float32), (BLOCK, 2)))


@triton.jit
def swiglu_rows_kernel(
    gate_up,
    biases,
    experts,
    act,
    limit,
    I: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr,
):
    """Activation of one routed row."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts + row).to(tl.int64)
    pairs = _read_row(gate_up + row * (2 * I), 2 * I, 2 * BLOCK)
    biases += expert * (2 * I)
    act += row * I
    for piece in tl.static_range(len(pairs)):
        gate, up = _split(pairs[piece], BLOCK)
        bias = _read(biases, 2 * piece * BLOCK, 2 * I, 2 * BLOCK)
        bias_gate, bias_up = _split(bias, BLOCK)
        gate, up, sigmoid = _held(gate + bias_gate, up + bias_up, limit)
        _write(act, piece * BLOCK, (up + 1.0) * (gate * sigmoid), I, BLOCK)


@triton.jit
def swiglu_rows_backward_kernel(
    grads,
    gate_up,
    biases,
    experts,
    scores,
    out,  # may be gate_up: a row is read by the program that writes it, and before
    dots,
    limit,
    I: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr,
):
    """Gradient to one routed row, and its dot product."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts + row).to(tl.int64)
    pairs = _read_row(gate_up + row * (2 * I), 2 * I, 2 * BLOCK)
    grad_pieces = _read_row(grads + row * I, I, BLOCK)
    score = tl.load(scores + row).to(tl.float32)
    biases += expert * (2 * I)
    out += row * (2 * I)
    dot = tl.zeros((BLOCK,), tl.float32)
    for piece in tl.static_range(len(pairs)):
        gate, up = _split(pairs[piece], BLOCK)
        grad = grad_pieces[piece].to(tl.float32)
        bias = _read(biases, 2 * piece * BLOCK, 2 * I, 2 * BLOCK)
        bias_gate, bias_up = _split(bias, BLOCK)
        act, grad_gate, grad_up = _through(grad, score, gate + bias_gate, up + bias_up, limit)
        dot += act * grad
        both = tl.reshape(tl.join(grad_gate, grad_up), (2 * BLOCK,))
        _write(out, 2 * piece * BLOCK, both, 2 * I, 2 * BLOCK)
    tl.store(dots + row, tl.sum(dot, 0))


@triton.jit
def swiglu_kernel(
    gates,
    ups,
    gate_bias,
    up_bias,
    act,
    stride,
    limit,
    I: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr,
):
    """Activation of one dense row."""
    row = tl.program_id(0).to(tl.int64)
    gate_pieces = _read_row(gates + row * stride, I, BLOCK)
    up_pieces = _read_row(ups + row * stride, I, BLOCK)
    act += row * I
    for piece in tl.static_range(len(gate_pieces)):
        start = piece * BLOCK
        gate = gate_pieces[piece].to(tl.float32) + _read(gate_bias, start, I, BLOCK)
        up = up_pieces[piece].to(tl.float32) + _read(up_bias, start, I, BLOCK)
        gate, up, sigmoid = _held(gate, up, limit)
        _write(act, start, (up + 1.0) * (gate * sigmoid), I, BLOCK)


@triton.jit
def swiglu_backward_kernel(
    grads,
    gates,
    ups,
    gate_bias,
    up_bias,
    scale,
    grad_halves,  # [T, 2I]: gradient to gate, then to up
    act,
    dots,
    stride,
    limit,
    I: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr,
):
    """Gradients to one dense row, its scaled activation and its dot product."""
    row = tl.program_id(0).to(tl.int64)
    gate_pieces = _read_row(gates + row * stride, I, BLOCK)
    up_pieces = _read_row(ups + row * stride, I, BLOCK)
    grad_pieces = _read_row(grads + row * I, I, BLOCK)
    factor = tl.load(scale).to(tl.float32)
    act += row * I
    grad_halves += row * (2 * I)
    dot = tl.zeros((BLOCK,), tl.float32)
    for piece in tl.static_range(len(gate_pieces)):
        start = piece * BLOCK
        gate = gate_pieces[piece].to(tl.float32) + _read(gate_bias, start, I, BLOCK)
        up = up_pieces[piece].to(tl.float32) + _read(up_bias, start, I, BLOCK)
        grad = grad_pieces[piece].to(tl.float32)
        value, grad_gate, grad_up = _through(grad, factor, gate, up, limit)
        dot += value * grad
        _write(act, start, value * factor, I, BLOCK)
        _write(grad_halves, start, grad_gate, I, BLOCK)
        _write(grad_halves + I, start, grad_up, I, BLOCK)
    tl.store(dots + row, tl.sum(dot, 0))


def swiglu_rows(gate_up_RI: Tensor, bias_EI: Tensor, expert_R: Tensor, limit: float) -> Tensor:
    """See :func:`nexus_cli.core.kernels.swiglu.swiglu_rows`."""
    rows, width = gate_up_RI.shape
    piece = _piece(width // 2)
    act_RI = gate_up_RI.new_empty(rows, width // 2)
    swiglu_rows_kernel[(rows,)](
        gate_up_RI,
        bias_EI,
        expert_R,
        act_RI,
        limit,
        I=width // 2,
        BLOCK=piece,
        num_warps=max(1, piece // ROUTED_WARP),
    )
    return act_RI


def swiglu_rows_backward(
    grad_act_RI: Tensor,
    gate_up_RI: Tensor,
    bias_EI: Tensor,
    expert_R: Tensor,
    score_R: Tensor,
    limit: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`nexus_cli.core.kernels.swiglu.swiglu_rows_backward`."""
    rows, width = gate_up_RI.shape
    piece = _piece(width // 2)
    if out is None:
        out = torch.empty_like(gate_up_RI)
    dot_R = gate_up_RI.new_empty(rows, dtype=torch.float32)
    swiglu_rows_backward_kernel[(rows,)](
        grad_act_RI,
        gate_up_RI,
        bias_EI,
        expert_R,
        score_R,
        out,
        dot_R,
        limit,
        I=width // 2,
        BLOCK=piece,
        num_warps=max(1, piece // ROUTED_WARP),
    )
    return out, dot_R


def swiglu(
    gate_TI: Tensor, up_TI: Tensor, gate_bias_I: Tensor, up_bias_I: Tensor, limit: float
) -> Tensor:
    """See :func:`nexus_cli.core.kernels.swiglu.swiglu`."""
    tokens, width = gate_TI.shape
    piece = _piece(width)
    act_TI = gate_TI.new_empty(tokens, width)
    swiglu_kernel[(tokens,)](
        gate_TI,
        up_TI,
        gate_bias_I,
        up_bias_I,
        act_TI,
        gate_TI.stride(0),
        limit,
        I=width,
        BLOCK=piece,
        num_warps=max(1, piece // DENSE_WARP),
    )
    return act_TI


def swiglu_backward(
    grad_act_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    gate_bias_I: Tensor,
    up_bias_I: Tensor,
    scale: Tensor,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`nexus_cli.core.kernels.swiglu.swiglu_backward`."""
    tokens, width = gate_TI.shape
    piece = _piece(width)
    grads = gate_TI.new_empty(tokens, 2 * width)
    act_TI = gate_TI.new_empty(tokens, width)
    dot_T = gate_TI.new_empty(tokens, dtype=torch.float32)
    swiglu_backward_kernel[(tokens,)](
        grad_act_TI,
        gate_TI,
        up_TI,
        gate_bias_I,
        up_bias_I,
        scale,
        grads,
        act_TI,
        dot_T,
        gate_TI.stride(0),
        limit,
        I=width,
        BLOCK=piece,
        num_warps=max(1, piece // DENSE_WARP),
    )
    return grads[:, :width], grads[:, width:], act_TI, dot_T


def _piece(width: int) -> int:
    return min(PIECE, triton.next_power_of_2(width))
