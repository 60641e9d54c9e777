import pytest

pytest.importorskip("triton")

from nexus_cli.core.kernels.triton import head_kept, head_loss, head_top_k

CAPABILITIES = (80, 90, 100)
ROW = {"rows": "i32", "slices": "i32", "vocabulary": "i32"}
SCALE = {"temperature": "fp32", "inverse_temperature": "fp32"}
KEPT = {"ids": "*i64", "logprobs": "*fp32"}
WEIGHTS = {"labels": "*i64", "ce_weights": "*fp32", "kd_weights": "*fp32"}
TILES = {"TILES": head_loss.TILES_A_SLICE}
BLOCKS = {"BLOCK_D": head_loss.DEPTH, "BLOCK_L": head_loss.LANES}


def floats(*names):
    return dict.fromkeys(names, "*fp32")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("soft", "dense"), [(False, False), (True, False), (True, True)])
def test_the_first_reading_of_the_logits(compile_kernel, capability, soft, dense):
    built = compile_kernel(
        head_loss.slice_kernel,
        floats("student", "teacher", "partial") | ROW | {"inverse_temperature": "fp32"},
        {"SOFT": soft, "DENSE": dense, "METRICS": True, **TILES, **BLOCKS},
        capability=capability,
        num_warps=head_loss.WARPS,
    )
    assert built.stack_bytes == 0
    assert built.registers <= 128  # four programs of four warps on a multiprocessor


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dense", [False, True])
def test_the_second_reading_of_the_logits(compile_kernel, capability, dense):
    built = compile_kernel(
        head_loss.gradient_kernel,
        floats("student", "teacher", "coefficients")
        | {"labels": "*i64", "out": "*bf16"}
        | ROW
        | {"inverse_temperature": "fp32"},
        {"SOFT": True, "KD": True, "DENSE": dense, **TILES, "BLOCK": 2048},
        capability=capability,
        num_warps=head_loss.WARPS,
    )
    assert built.stack_bytes == 0
    assert built.registers <= 64


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_sums_of_a_row(compile_kernel, capability):
    results = floats("parts", "coefficients")
    flags = {"SOFT": True, "METRICS": True, "BLOCK_S": 16}
    small = {"capability": capability, "num_warps": 1}
    dense = compile_kernel(
        head_loss.combine_kernel,
        floats("student", "partial") | WEIGHTS | results | ROW | SCALE,
        {"DENSE": True, **flags},
        **small,
    )
    kept = compile_kernel(
        head_kept.combine_kept_kernel,
        floats("partial", "tails", "kept", "label_logits")
        | KEPT
        | WEIGHTS
        | results
        | {"rows": "i32", "slices": "i32"}
        | SCALE,
        {"K": 32, "BLOCK_K": 32, **flags},
        **small,
    )
    assert dense.stack_bytes == kept.stack_bytes == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_taking_and_putting_the_kept_entries(compile_kernel, capability):
    small = {"capability": capability, "num_warps": 1}
    shape = {"K": 30, "BLOCK_K": 32}
    take = compile_kernel(
        head_kept.take_kernel,
        floats("logits", "kept", "label_logits") | KEPT | {"labels": "*i64", "vocabulary": "i32"},
        shape,
        **small,
    )
    put = compile_kernel(
        head_kept.put_kernel,
        {"out": "*bf16", **KEPT, "gradients": "*fp32", "vocabulary": "i32"},
        shape,
        **small,
    )
    assert take.stack_bytes == put.stack_bytes == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("k", [32, 64])
def test_the_top_k(compile_kernel, capability, k):
    blocks, width = 4096, head_top_k.WIDTH.value  # of 201,088 logits
    built = [
        compile_kernel(
            head_top_k.block_kernel,
            floats("logits", "tops", "sums")
            | {"programs": "i32", "vocabulary": "i32", "blocks": "i32"},
            {"BLOCK_B": head_top_k.BLOCKS_A_PROGRAM},
            capability=capability,
        ),
        compile_kernel(
            head_top_k.choose_blocks_kernel,
            floats("tops", "sums", "rests") | {"chosen": "*i32", "blocks": "i32"},
            {"K": k, "BLOCK": blocks},
            capability=capability,
            num_warps=head_top_k.warps_for(blocks),
        ),
        compile_kernel(
            head_top_k.choose_logits_kernel,
            floats("logits", "rests", "values", "tails")
            | {"chosen": "*i32", "ids": "*i32", "vocabulary": "i32"},
            {"B": k, "K": k, "BLOCK_B": k},
            capability=capability,
            num_warps=head_top_k.warps_for(k * width),
        ),
        compile_kernel(
            head_top_k.finish_kernel,
            floats("logits", "values", "rests", "tails", "logprobs", "tail_sums", "nlls")
            | {"labels": "*i64", "found": "*i32", "ids": "*i64", "vocabulary": "i32"},
            {"K": k, "BLOCK_K": k},
            capability=capability,
            num_warps=1,
        ),
    ]
    assert all(kernel.stack_bytes == 0 for kernel in built)
    assert all(kernel.registers <= 160 for kernel in built)
