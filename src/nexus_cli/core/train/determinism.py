"""Bit-equal runs: what torch must be told, and before what."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.utils.deterministic

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def make_deterministic() -> None:
    """Let torch use deterministic operations only; an operation that has none raises.

    Covered: two runs of one command on the same machine, versions, number of ranks and free
    memory (which decides what is kept and decoded). Nexus's own kernels use no atomics and are
    deterministic always; this adds the operations of torch around them. cuBLAS reads its setting
    when it is first used, so this must come before anything runs on a GPU.
    """
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling fresh memory shows reads of what nobody wrote; it costs a pass, and changes no result.
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
