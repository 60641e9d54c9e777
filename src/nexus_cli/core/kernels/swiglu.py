"""GPT-OSS's clamped SwiGLU and its gradient: routed rows (interleaved) and dense halves.

``act = (u + 1) g sigmoid(1.702 g)``, g clamped above and u on both sides. A clamp passes its
gradient where the value is inside or on the limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Shape letters in this file: T tokens, R routed rows, I expert width, E experts. Routed tensors
# hold gate and up interleaved, so there an I in a name like gate_up_RI is 2I columns.

ALPHA = 1.702


def swiglu_rows(gate_up_RI: Tensor, bias_EI: Tensor, expert_R: Tensor, limit: float) -> Tensor:
    """Activation of rows that belong to experts, in float32, rounded once.

    Args:
        gate_up_RI: products without bias ``[R, 2I]``, contiguous: gate, up, gate, up, ...
        bias_EI: of the experts ``[E, 2I]``, interleaved alike, any float dtype.
        expert_R: expert of each row, int32.
        limit: of the clamps.

    Returns:
        ``[R, I]`` in the dtype of ``gate_up_RI``.

    Raises:
        ValueError: if shapes, devices, dtypes or strides do not fit.
    """
    if _rows_on_gpu(gate_up_RI, bias_EI, expert_R):
        from nexus_cli.core.kernels.triton import swiglu as kernels

        return kernels.swiglu_rows(gate_up_RI, bias_EI, expert_R, limit)
    return swiglu_rows_torch(gate_up_RI, bias_EI, expert_R, limit)


def swiglu_rows_torch(
    gate_up_RI: Tensor, bias_EI: Tensor, expert_R: Tensor, limit: float
) -> Tensor:
    """:func:`swiglu_rows` in PyTorch, on any device."""
    gate, up = _biased_pairs(gate_up_RI, bias_EI, expert_R)
    return _activation(gate, up, limit).to(gate_up_RI.dtype)


def swiglu_rows_backward(
    grad_act_RI: Tensor,
    gate_up_RI: Tensor,
    bias_EI: Tensor,
    expert_R: Tensor,
    score_R: Tensor,
    limit: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient through ``score * activation``, and the dot product that the score needs.

    Args:
        grad_act_RI: gradient to the scored activation ``[R, I]``, contiguous.
        gate_up_RI: as in the forward pass.
        bias_EI: likewise.
        expert_R: likewise.
        score_R: weight of each row, any float dtype.
        limit: of the clamps.
        out: receives the gradient; ``gate_up_RI`` itself is allowed.

    Returns:
        Gradient to ``gate_up_RI`` ``[R, 2I]``, and ``dot_R = sum_i act * grad_act``, float32
        (float64 for float64 rows), neither of its factors scored.

    Raises:
        ValueError: if shapes, devices, dtypes or strides do not fit.
    """
    on_gpu = _rows_on_gpu(gate_up_RI, bias_EI, expert_R)
    rows, width = gate_up_RI.shape
    if grad_act_RI.shape != (rows, width // 2) or score_R.shape != (rows,):
        raise ValueError("the gradient or the scores do not fit the rows")
    if out is not None and (out.shape != gate_up_RI.shape or out.dtype != gate_up_RI.dtype):
        raise ValueError("the output does not fit the rows")
    if on_gpu:
        from nexus_cli.core.kernels.triton import swiglu as kernels

        given = (grad_act_RI, score_R) if out is None else (grad_act_RI, score_R, out)
        _check_on(gate_up_RI, *given)
        return kernels.swiglu_rows_backward(
            grad_act_RI, gate_up_RI, bias_EI, expert_R, score_R, limit, out
        )
    return swiglu_rows_backward_torch(
        grad_act_RI, gate_up_RI, bias_EI, expert_R, score_R, limit, out
    )


def swiglu_rows_backward_torch(
    grad_act_RI: Tensor,
    gate_up_RI: Tensor,
    bias_EI: Tensor,
    expert_R: Tensor,
    score_R: Tensor,
    limit: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`swiglu_rows_backward` in PyTorch, on any device."""
    gate, up = _biased_pairs(gate_up_RI, bias_EI, expert_R)
    grad = grad_act_RI.to(gate.dtype)
    dot_R = (_activation(gate, up, limit) * grad).sum(-1)
    halves = _activation_backward(grad * score_R.to(gate.dtype)[:, None], gate, up, limit)
    grad_RI = torch.stack(halves, dim=-1).flatten(1).to(gate_up_RI.dtype)
    return grad_RI if out is None else out.copy_(grad_RI), dot_R


def swiglu(
    gate_TI: Tensor, up_TI: Tensor, gate_bias_I: Tensor, up_bias_I: Tensor, limit: float
) -> Tensor:
    """Activation of a dense expert, in float32, rounded once.

    Args:
        gate_TI: products without bias; rows may be strided, columns not.
        up_TI: likewise, with the same strides.
        gate_bias_I: any float dtype.
        up_bias_I: any float dtype.
        limit: of the clamps.

    Returns:
        ``[T, I]``, contiguous, in the dtype of ``gate_TI``.

    Raises:
        ValueError: if shapes, devices, dtypes or strides do not fit.
    """
    if _halves_on_gpu(gate_TI, up_TI, gate_bias_I, up_bias_I):
        from nexus_cli.core.kernels.triton import swiglu as kernels

        return kernels.swiglu(gate_TI, up_TI, gate_bias_I, up_bias_I, limit)
    return swiglu_torch(gate_TI, up_TI, gate_bias_I, up_bias_I, limit)


def swiglu_torch(
    gate_TI: Tensor, up_TI: Tensor, gate_bias_I: Tensor, up_bias_I: Tensor, limit: float
) -> Tensor:
    """:func:`swiglu` in PyTorch, on any device."""
    gate, up = _biased(gate_TI, gate_bias_I), _biased(up_TI, up_bias_I)
    return _activation(gate, up, limit).to(gate_TI.dtype)


def swiglu_backward(
    grad_act_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    gate_bias_I: Tensor,
    up_bias_I: Tensor,
    scale: Tensor,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through ``scale * activation``, with what the other gradients need.

    Args:
        grad_act_TI: gradient to the scaled activation, contiguous.
        gate_TI: as in the forward pass.
        up_TI: likewise.
        gate_bias_I: likewise.
        up_bias_I: likewise.
        scale: one element on the device of the rows (the output gate).
        limit: of the clamps.

    Returns:
        Gradients to gate and up (the halves of one ``[T, 2I]`` tensor), the activation times
        the scale ``[T, I]``, and ``dot_T = sum_i act * grad_act``, float32 (float64 for float64
        rows), neither of its factors scaled.

    Raises:
        ValueError: if shapes, devices, dtypes or strides do not fit.
    """
    on_gpu = _halves_on_gpu(gate_TI, up_TI, gate_bias_I, up_bias_I)
    if grad_act_TI.shape != gate_TI.shape or scale.numel() != 1:
        raise ValueError("the gradient or the scale does not fit the rows")
    if on_gpu:
        from nexus_cli.core.kernels.triton import swiglu as kernels

        _check_on(gate_TI, grad_act_TI, scale)
        return kernels.swiglu_backward(
            grad_act_TI, gate_TI, up_TI, gate_bias_I, up_bias_I, scale, limit
        )
    return swiglu_backward_torch(grad_act_TI, gate_TI, up_TI, gate_bias_I, up_bias_I, scale, limit)


def swiglu_backward_torch(
    grad_act_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    gate_bias_I: Tensor,
    up_bias_I: Tensor,
    scale: Tensor,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`swiglu_backward` in PyTorch, on any device."""
    gate, up = _biased(gate_TI, gate_bias_I), _biased(up_TI, up_bias_I)
    grad, factor = grad_act_TI.to(gate.dtype), scale.to(gate.dtype).reshape(())
    act = _activation(gate, up, limit)
    halves = torch.cat(_activation_backward(grad * factor, gate, up, limit), dim=1)
    grad_gate_TI, grad_up_TI = halves.to(gate_TI.dtype).chunk(2, dim=1)
    return grad_gate_TI, grad_up_TI, (act * factor).to(gate_TI.dtype), (act * grad).sum(-1)


def _activation(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(ALPHA * gate)


def _activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    held_gate, held_up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = torch.sigmoid(ALPHA * held_gate)
    slope = sigmoid * (1 + ALPHA * held_gate * (1 - sigmoid))
    grad_gate = grad * (held_up + 1) * slope * (gate <= limit)
    return grad_gate, grad * held_gate * sigmoid * (up.abs() <= limit)


def _biased(x_TI: Tensor, bias_I: Tensor) -> Tensor:
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    return x_TI.to(dtype) + bias_I.to(dtype)


def _biased_pairs(gate_up_RI: Tensor, bias_EI: Tensor, expert_R: Tensor) -> tuple[Tensor, Tensor]:
    pairs = _biased(gate_up_RI, bias_EI[expert_R.long()])
    return pairs[:, ::2], pairs[:, 1::2]


def _rows_on_gpu(gate_up_RI: Tensor, bias_EI: Tensor, expert_R: Tensor) -> bool:
    rows, width = gate_up_RI.shape
    if width % 2 or bias_EI.shape[1:] != (width,) or expert_R.shape != (rows,):
        raise ValueError(
            f"rows {tuple(gate_up_RI.shape)}, biases {tuple(bias_EI.shape)} and experts "
            f"{tuple(expert_R.shape)} do not fit"
        )
    if not _is_gpu(gate_up_RI):
        return False
    _check_on(gate_up_RI, gate_up_RI, bias_EI, expert_R)
    return True


def _halves_on_gpu(gate: Tensor, up: Tensor, gate_bias: Tensor, up_bias: Tensor) -> bool:
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError("gate and up differ in shape or dtype")
    if gate_bias.shape != gate.shape[1:] or up_bias.shape != gate.shape[1:]:
        raise ValueError("the biases do not fit the rows")
    if not _is_gpu(gate):
        return False
    _check_on(gate, gate_bias, up_bias)
    if gate.stride(1) != 1 or up.stride() != gate.stride() or up.device != gate.device:
        raise ValueError("gate and up need contiguous columns and equal strides")
    return True


def _is_gpu(x: Tensor) -> bool:
    """True for the kernel, False for the twin."""
    if x.is_cuda:
        if x.dtype == torch.float64:
            raise ValueError("float64 is for the CPU")
        return True
    if x.device.type != "cpu":
        raise ValueError(f"no kernel for {x.device}")
    return False


def _check_on(x: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.device != x.device or not other.is_contiguous():
            raise ValueError("the tensors must be contiguous and on one device")
