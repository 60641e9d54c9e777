"""The attention kernels' machine code: tensor cores in use, nothing spilled."""

import pytest
import torch

pytest.importorskip("triton")

from nexus_cli.core.kernels.triton import attention as forward
from nexus_cli.core.kernels.triton import attention_backward as backward
from nexus_cli.core.kernels.triton import attention_keys as keys

HEADS, KV_HEADS = 64, 8
COMMON = {"qkv_ptr": "*bf16", "seq": "i32"}
FORWARD = COMMON | {
    "sink_ptr": "*bf16",
    "start_ptr": "*i32",
    "out_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "scale_log2": "fp32",
}
QUERY = COMMON | {
    "grad_ptr": "*bf16",
    "out_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "start_ptr": "*i32",
    "grad_qkv_ptr": "*bf16",
    "rows_ptr": "*fp32",
    "padded": "i32",
    "scale": "fp32",
}
KEY = COMMON | {
    "grad_ptr": "*bf16",
    "rows_ptr": "*fp32",
    "last_ptr": "*i32",
    "result_ptr": "*bf16",
    "padded": "i32",
    "scale": "fp32",
}
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "MMA", 120: "MMA"}
# Of a block: A100, RTX 4090, H100, B200, RTX 5090.
SHARED_BYTES = {
    cc: kib * 1024 for cc, kib in ((80, 163), (89, 99), (90, 227), (100, 227), (120, 99))
}
CARDS = list(SHARED_BYTES)


def check(built, capability):
    assert built.stack_bytes == 0
    assert built.shared_bytes <= SHARED_BYTES[capability]
    assert TENSOR_CORE[capability] in built.sass
    if capability == 90:
        # The assembler falls back to waiting for every product where it finds no registers.
        assert built.sass.count("WARPGROUP.DEPBAR") < built.sass.count("HGMMA") / 2


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize(("narrow", "head_dim"), [(False, 64), (True, 64), (False, 128)])
def test_attention_compiles(compile_kernel, capability, narrow, head_dim):
    shape = {"HQ": HEADS, "HKV": KV_HEADS, "D": head_dim}
    kind = torch.bfloat16, head_dim, 128 if narrow else None, capability // 10
    for kernel, signature, tiles in (
        (forward.forward_kernel, FORWARD, forward.FORWARD_TILES),
        (backward.query_kernel, QUERY, backward.QUERY_TILES),
    ):
        tile = forward.choose_tile(tiles, *kind)
        arguments = forward.tile_arguments(tile)
        launch = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
        constants = shape | arguments
        check(
            compile_kernel(kernel, signature, constants, capability=capability, **launch),
            capability,
        )


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize(
    ("narrow", "head_dim", "split"), [(False, 64, 1), (True, 64, 4), (False, 128, 1)]
)
def test_key_gradients_compile(compile_kernel, capability, narrow, head_dim, split):
    window = 128 if narrow else None
    tile = forward.choose_tile(keys.KEY_TILES, torch.bfloat16, head_dim, window, capability // 10)
    constants = {
        "HQ": HEADS,
        "HKV": KV_HEADS,
        "D": head_dim,
        "SPLIT": split,
        "RESULT_ROW": (HEADS + 2 * KV_HEADS if split == 1 else 2 * KV_HEADS) * head_dim,
        "RESULT_COLUMN": HEADS * head_dim if split == 1 else 0,
        "POSITIONS": tile.positions,
        "KEYS": tile.keys,
    }
    signature = KEY if split == 1 else KEY | {"result_ptr": "*fp32"}
    built = compile_kernel(
        keys.key_kernel,
        signature,
        constants,
        capability=capability,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    check(built, capability)


@pytest.mark.parametrize("capability", CARDS)
def test_sum_compiles(compile_kernel, capability):
    built = compile_kernel(
        keys.sum_kernel,
        {"part_ptr": "*fp32", "grad_qkv_ptr": "*bf16", "numel": "i32"},
        {"SPLIT": 4, "COLUMNS": 1024, "ROW": 5120, "COLUMN": 4096, "BLOCK": keys.SUM_BLOCK},
        capability=capability,
    )
    assert built.stack_bytes == 0


@pytest.mark.parametrize("capability", [8, 9, 10, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 128])
def test_every_tile_of_keys_reads_rows_that_were_written(capability, dtype, head_dim, window):
    tile = forward.choose_tile(keys.KEY_TILES, dtype, head_dim, window, capability)
    queries = forward.choose_tile(backward.QUERY_TILES, dtype, head_dim, window, capability)
    for group in (1, 2, 6, 8):
        assert queries.fit(group).positions % tile.positions == 0
        assert group % queries.fit(group).heads == 0


def test_heads_are_split_where_programs_are_few():
    assert [keys.key_split(programs, 8) for programs in (1, 40, 128, 264, 1000)] == [8, 8, 4, 1, 1]
    assert keys.key_split(1, 6) == 2
    assert keys.key_split(1, 1) == 1
