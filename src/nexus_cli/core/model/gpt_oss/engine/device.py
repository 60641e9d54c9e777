"""Which GPU a kernel is launched on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one; nothing for a tensor on the CPU.

    torch's own operations go where their tensors are, Triton's kernels to the current GPU and its
    stream. Two models on two GPUs need both to agree.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
