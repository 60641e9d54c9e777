"""The AdamW kernel compiles for every generation, and holds its numbers in registers."""

from __future__ import annotations

import pytest

from nexus_cli.core.kernels.triton.adamw_8bit import BLOCK, ROWS, WARPS, adamw_8bit_kernel

SIGNATURE = {
    "weight_ptr": "*i16",
    "remainder_ptr": "*i16",
    "first_ptr": "*i8",
    "first_scale_ptr": "*fp32",
    "second_ptr": "*u8",
    "second_scale_ptr": "*fp32",
    "grad_ptr": "*bf16",
    "grad_factor_ptr": "*fp32",
    "count": "i32",
    **dict.fromkeys(("decay", "step_size", "root_factor"), "fp32"),
    **dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "epsilon"), "fp32"),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("grad", ["*bf16", "*fp32"])
def test_it_compiles_without_spills_and_with_wide_accesses(compile_kernel, capability, grad):
    built = compile_kernel(
        adamw_8bit_kernel,
        SIGNATURE | {"grad_ptr": grad},
        {"HAS_FACTOR": True, "ROWS": ROWS, "BLOCK": BLOCK},
        capability=capability,
        num_warps=WARPS,
    )
    assert built.stack_bytes == 0
    assert built.registers <= 64  # eight blocks on a multiprocessor
    assert built.shared_bytes <= 64  # maxima of blocks alone
    assert built.sass.count("LDG.E.128") == (3 if grad == "*bf16" else 4)
    assert built.sass.count("STG.E.128") == 2  # weight and remainder; codes are half as wide
