"""Packing to MXFP4 against transformers' decoder and an exhaustive search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nexus_cli.core.model.gpt_oss.mxfp4 import quantize_mxfp4

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize_with_transformers(blocks: Tensor, scales: Tensor) -> Tensor:
    """``[E, out, in]`` as float64; transformers returns ``[E, in, out]``."""
    dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return dense.transpose(1, 2).double()


def nearest_by_search(values: Tensor, exponent: int) -> Tensor:
    """Each value's nearest multiple, the even code where two are as near."""
    table = torch.tensor(MAGNITUDES, dtype=torch.float64) * 2.0**exponent
    distance = (values.double().abs().unsqueeze(-1) - table).abs()
    # An odd code loses a tie by less than any real difference.
    distance = distance + torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]) * 1e-12 * 2.0**exponent
    return table[distance.argmin(-1)] * values.double().sign()


def random_weight(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(3 * torch.randn(*shape[:-1], 1, generator=generator))
    return spread * torch.randn(*shape, generator=generator)


def test_shapes_and_types_are_the_checkpoints() -> None:
    blocks, scales = quantize_mxfp4(random_weight(0, 3, 8, 96))
    assert (blocks.shape, blocks.dtype) == ((3, 8, 3, 16), torch.uint8)
    assert (scales.shape, scales.dtype) == ((3, 8, 3), torch.uint8)


def test_each_value_takes_the_nearest_code_of_its_block() -> None:
    weight = random_weight(1, 2, 16, 64)
    blocks, scales = quantize_mxfp4(weight)
    decoded = dequantize_with_transformers(blocks, scales)
    by_block = weight.unflatten(-1, (-1, 32)).flatten(0, 2)
    expected = torch.stack(
        [
            nearest_by_search(block, scale - 127)
            for block, scale in zip(by_block, scales.flatten().tolist(), strict=True)
        ]
    )
    assert torch.equal(decoded, expected.view_as(decoded))


def test_no_neighbouring_exponent_of_the_two_candidates_is_better() -> None:
    weight = random_weight(2, 1, 64, 128)
    blocks, scales = quantize_mxfp4(weight)
    by_block = weight.unflatten(-1, (-1, 32)).flatten(0, 2).double()
    decoded = dequantize_with_transformers(blocks, scales).reshape(by_block.shape)
    chosen = (decoded - by_block).square().sum(-1)
    ocp = torch.floor(torch.log2(by_block.abs().amax(-1))).int() - 2
    for step in (0, 1):
        for block, exponent, error in zip(by_block, (ocp + step).tolist(), chosen, strict=True):
            other = (nearest_by_search(block, exponent) - block).square().sum()
            assert error <= other * (1 + 1e-6)
    both = set((scales.flatten().int() - 127 - ocp).tolist())
    assert both == {0, 1}  # each candidate wins somewhere, or the test says nothing


def test_ties_go_to_the_even_code_and_large_values_saturate() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    weight = torch.zeros(1, 1, 32)
    weight[0, 0, :8] = torch.tensor(ties)
    weight[0, 0, 8:16] = -torch.tensor(ties)
    decoded = dequantize_with_transformers(*quantize_mxfp4(weight))[0, 0]
    assert decoded[:8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert decoded[8:16].tolist() == [0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, -6.0]
    codes = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0] * 6 + [6.5, -6.5])  # exact at exponent 0
    saturated = dequantize_with_transformers(*quantize_mxfp4(codes.view(1, 1, 32)))[0, 0]
    assert saturated[-2:].tolist() == [6.0, -6.0]


def test_what_was_packed_once_packs_to_itself() -> None:
    weight = random_weight(3, 2, 8, 64)
    blocks, scales = quantize_mxfp4(weight)
    decoded = dequantize_with_transformers(blocks, scales)
    again = dequantize_with_transformers(*quantize_mxfp4(decoded.float()))
    assert torch.equal(again, decoded)
    assert torch.equal(
        dequantize_with_transformers(*quantize_mxfp4(decoded.to(torch.bfloat16))), decoded
    )


def test_element_2j_is_in_the_low_nibble() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 6], weight[0, 7] = 6.0, -1.0
    blocks, scales = quantize_mxfp4(weight)
    assert scales.tolist() == [[127]]
    assert blocks[0, 0, 3].item() == (0b1010 << 4) | 0b0111


def test_zeros_and_the_smallest_and_largest_floats_survive() -> None:
    blocks, _ = quantize_mxfp4(torch.zeros(4, 32))
    assert not blocks.any()
    for extreme in (torch.finfo(torch.float32).tiny, 2.0**127, 2.0**-149):
        packed = quantize_mxfp4(torch.full((1, 1, 32), extreme))
        assert packed[1].max() <= 254
        decoded = dequantize_with_transformers(*packed)
        assert torch.isfinite(decoded).all()


def test_odd_sizes_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_mxfp4(torch.zeros(4, 48))
    with pytest.raises(ValueError, match="finite"):
        quantize_mxfp4(torch.full((1, 32), float("nan")))
