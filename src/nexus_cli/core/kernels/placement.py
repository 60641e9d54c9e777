"""Where a function of this package runs: as a Triton kernel, or as its PyTorch twin."""

from __future__ import annotations

import torch
from torch import Tensor


def on_gpu(x: Tensor, *others: Tensor) -> bool:
    """Whether the Triton kernel is due; raises ValueError unless all tensors can be read by it."""
    if x.is_cuda:
        if x.dtype == torch.float64:
            raise ValueError("float64 is for the CPU")
        for tensor in (x, *others):
            if tensor.device != x.device or not tensor.is_contiguous():
                raise ValueError("the tensors must be contiguous and on one device")
        return True
    if x.device.type != "cpu":
        raise ValueError(f"no kernel for {x.device}")
    return False
