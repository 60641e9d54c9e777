"""The memory-bound kernels compiled for GPUs that are not here, at the real model's sizes."""

import re

import pytest

from nexus_cli.core.kernels.triton import rms_norm, rotary, router, rows, swiglu, unit_sums

CAPABILITIES = [80, 90, 100]
BF16, FP32, I32 = "*bf16", "*fp32", "*i32"
ROW = {"H": 2880, "BLOCK": 4096}
PIECES = {"I": 2880, "BLOCK": swiglu.PIECE}
ROUTED, DENSE = swiglu.PIECE // swiglu.ROUTED_WARP, swiglu.PIECE // swiglu.DENSE_WARP
SWIGLU = {"gate_up": BF16, "biases": BF16, "experts": I32}
HALVES = {"gates": BF16, "ups": BF16, "gate_bias": FP32, "up_bias": FP32}
NORM = {"x": BF16, "weight": BF16, "normed": BF16, "rstds": FP32, "eps": "fp32"}
CHOICE = {"E": 128, "K": 4, "BLOCK_T": 16, "BLOCK_E": 128}

# Kernel, its run-time arguments, its constants, warps, registers that leave the SM enough warps.
KERNELS = {
    "norm": (rms_norm.norm_kernel, NORM, {"y": None, "total": None, **ROW}, rms_norm.WARPS, 64),
    "add norm": (
        rms_norm.norm_kernel, {**NORM, "y": BF16, "total": BF16}, ROW, rms_norm.WARPS, 64,
    ),
    "norm backward": (
        rms_norm.norm_backward_kernel,
        {"grad": BF16, "x": BF16, "rstds": FP32, "weight": BF16, "residual": BF16, "dx": BF16},
        ROW, rms_norm.WARPS, 96,
    ),
    "rotate": (
        rotary.rotate_kernel,
        {"qkv": BF16, "cosines": FP32, "sines": FP32, "stride": "i32"},
        {"HEADS": 72, "R": 32, "INVERSE": True, "BLOCK_HEADS": 128, "BLOCK_R": 32}, 8, 64,
    ),
    "swiglu rows": (
        swiglu.swiglu_rows_kernel, {**SWIGLU, "act": BF16, "limit": "fp32"}, PIECES, ROUTED, 40,
    ),
    "swiglu rows backward": (
        swiglu.swiglu_rows_backward_kernel,
        {**SWIGLU, "grads": BF16, "scores": BF16, "out": BF16, "dots": FP32, "limit": "fp32"},
        PIECES, ROUTED, 48,
    ),
    "swiglu": (
        swiglu.swiglu_kernel,
        {**HALVES, "act": BF16, "stride": "i32", "limit": "fp32"}, PIECES, DENSE, 64,
    ),
    "swiglu backward": (
        swiglu.swiglu_backward_kernel,
        {**HALVES, "grads": BF16, "scale": FP32, "grad_halves": BF16, "act": BF16, "dots": FP32,
         "stride": "i32", "limit": "fp32"},
        PIECES, DENSE, 96,
    ),
    "spread": (
        rows.spread_kernel,
        {"x": BF16, "row_of": I32, "out": BF16}, ROW | {"K": 4}, rows.WARPS, 40,
    ),
    "combine": (
        rows.combine_kernel,
        {"rows": BF16, "row_of": I32, "scores": BF16, "experts": I32, "biases": BF16,
         "residual": BF16, "shared": BF16, "shared_bias": FP32, "shared_scale": FP32, "out": BF16},
        {"K": 4, "H": 2880, "BLOCK": rows.PIECE}, rows.WARPS, 72,
    ),
    "top k": (
        router.top_k_kernel,
        {"logits": BF16, "scores": BF16, "experts": I32, "tokens": "i32"},
        {**CHOICE, "BLOCK_K": 4}, router.WARPS, 96,
    ),
    "top k backward": (
        router.top_k_backward_kernel,
        {"grads": BF16, "scores": BF16, "experts": I32, "out": BF16, "tokens": "i32"},
        CHOICE, router.WARPS, 96,
    ),
    "unit sums": (
        unit_sums.unit_sums_kernel,
        {"hidden": BF16, "weight": FP32, "offsets": I32, "scale": FP32, "out": "*fp64"},
        {"WIDTH": 2880, "ROWS": unit_sums.ROWS, "UNITS": unit_sums.UNITS}, unit_sums.WARPS, 96,
    ),
}  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_spills_and_memory_is_read_by_sixteen_bytes(compile_kernel, name, capability):
    kernel, signature, constants, warps, registers = KERNELS[name]
    done = compile_kernel(kernel, signature, constants, capability=capability, num_warps=warps)
    assert done.stack_bytes == 0
    assert done.registers <= registers
    if not name.startswith("top k"):  # there a row is a few bytes
        assert re.search(r"LDG\.E\.(ENL2\.)?128", done.sass)
        assert re.search(r"STG\.E\.(ENL2\.)?(128|64)", done.sass)


@pytest.mark.parametrize("name", ["swiglu rows", "swiglu rows backward"])
def test_nothing_moves_between_the_warps_of_a_routed_row(compile_kernel, name):
    kernel, signature, constants, warps, _ = KERNELS[name]
    done = compile_kernel(kernel, signature, constants, num_warps=warps)
    assert done.shared_bytes <= 4 * warps  # the sum's last step
