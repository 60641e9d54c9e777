import pytest
import torch

from nexus_cli.core.kernels.unit_sums import add_unit_sums_


def case(rows=40, experts=5, width=24):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.rand(rows, generator=generator) * (torch.arange(rows) % 3 > 0)
    offsets = torch.tensor([7, 7, 20, 39, 40], dtype=torch.int32)  # the second expert has none
    scale = torch.rand(experts, width, generator=generator)
    return hidden, weight, offsets, scale


def test_sums_are_those_of_one_row_after_the_other():
    hidden, weight, offsets, scale = case()
    found = torch.ones(5, 24, dtype=torch.float64)
    assert add_unit_sums_(found, hidden, weight, offsets, scale) is found
    expected = torch.ones(5, 24, dtype=torch.float64)
    for row in range(40):
        expert = int((offsets <= row).sum())
        expected[expert] += (scale[expert] * weight[row] * hidden[row].abs()).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, offsets, scale = case()
    sums = torch.zeros(5, 24, dtype=torch.float64)
    for wrong in (
        (sums[:4], hidden, weight, offsets, scale),
        (sums, hidden, weight[1:], offsets, scale),
        (sums, hidden, weight, offsets, scale[:, 1:]),
    ):
        with pytest.raises(ValueError, match="40 rows of 24 units"):
            add_unit_sums_(*wrong)
