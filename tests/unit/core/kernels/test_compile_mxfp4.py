"""The MXFP4 kernels compiled for GPUs that are not here."""

import pytest

from nexus_cli.core.kernels.triton import mxfp4_decode, mxfp4_matmul

DECODE = {
    "blocks": "*u8", "scales": "*u8", "out": "*bf16", "rows": "i32", "features": "i32",
    "group_stride": "i32",
}  # fmt: skip
MATMUL = {
    "index": "*i32", "blocks": "*u8", "scales": "*u8", "offsets": "*i32", "out": "*bf16",
    "outputs": "i32", "inputs": "i32", "num_experts": "i32", "group_stride": "i32",
}  # fmt: skip
CHOICES = [
    pytest.param(transposed, tiles, id=f"{'transposed' if transposed else 'forward'} to {limit}")
    for transposed, table in ((False, mxfp4_matmul.FORWARD), (True, mxfp4_matmul.TRANSPOSED))
    for limit, tiles in table
]


def compile_matmul(compile_kernel, tiles, transposed, capability, *, mode="narrow"):
    kernel = mxfp4_matmul.transposed_kernel if transposed else mxfp4_matmul.forward_kernel
    return compile_kernel(
        kernel,
        MATMUL | {"grad" if transposed else "x": "*bf16"},
        {
            "feature_stride": 1, "GATHER": True, "MODE": mode, "EVEN": True, "PADDED": 32,
            "ROWS": tiles.rows, "FEATURES": tiles.features, "DEPTH": tiles.depth,
            "SWAPPED": tiles.swapped,
        },
        capability=capability,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_decoding_stores_sixteen_bytes_and_does_not_spill(compile_kernel, capability):
    compiled = compile_kernel(
        mxfp4_decode.decode_kernel,
        DECODE,
        {"feature_stride": 1, "GROUPS_OF_ROW": 90, "MODE": "wide", "ROWS": 128, "GROUPS": 2},
        capability=capability,
    )
    assert compiled.stack_bytes == 0
    assert "STG.E.128" in compiled.sass


@pytest.mark.parametrize(("transposed", "tiles"), CHOICES)
def test_products_on_hopper(compile_kernel, transposed, tiles):
    compiled = compile_matmul(compile_kernel, tiles, transposed, 90)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 227 * 1024
    assert "HGMMA" in compiled.sass
    assert compiled.sass.count("LDG.E.U8") <= 4  # packed bytes one by one would be dozens


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("capability", [80, 100])
def test_products_elsewhere(compile_kernel, transposed, capability):
    tiles = mxfp4_matmul.choose_tiles(32, transposed=transposed)
    compiled = compile_matmul(compile_kernel, tiles, transposed, capability, mode="wide")
    assert compiled.stack_bytes == 0
    assert "MMA" in compiled.sass
