"""What the card does at best, measured, and what the routed experts ask of it at least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timing import median_ms

BF16 = 2
PACKED = 17 / 32  # bytes a weight: 16 bytes of codes and one of scale for 32

# Operations and bytes of each measured part, by the part's name.
Work = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Ceilings:
    """Measured rates.

    Attributes:
        flops: operations a second of a large bf16 product.
        bytes: a second that a copy reads and writes.
    """

    flops: float
    bytes: float

    def __str__(self) -> str:
        return f"ceilings: {self.flops / 1e12:.0f} TFLOP/s, {self.bytes / 1e12:.2f} TB/s"

    def shares(self, work: Work, figures: Mapping[str, float | None]) -> dict[str, float]:
        """TFLOP/s and share of the roofline of every ``<part>_ms`` there is."""
        found = {}
        for part, (flops, moved) in work.items():
            ms = figures.get(f"{part}_ms")
            if ms is not None:
                found[f"{part}_tflops"] = flops / ms / 1e9
                bound = 1e3 * max(flops / self.flops, moved / self.bytes)
                found[f"{part}_share"] = bound / ms
        return found


def measure_ceilings(device: torch.device) -> Ceilings:
    """A product of 8192 x 8192 matrices, and a copy of 2 GiB; small ones on a CPU."""
    side, size = (8192, 2**31) if device.type == "cuda" else (256, 2**22)
    a = torch.randn(side, side, device=device).bfloat16()
    b = torch.randn(side, side, device=device).bfloat16()
    product = median_ms(lambda: a @ b, device, repeats=10)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), device, repeats=10)
    return Ceilings(2 * side**3 / product * 1e3, 2 * size / copy * 1e3)


def routed_work(tokens: int, top_k: int, hidden: int, used: int) -> Work:
    """Operations, and bytes that must move if every intermediate is written and read once.

    Args:
        tokens: T.
        top_k: experts a token.
        hidden: also the experts' width.
        used: experts that have any row; each packed weight of theirs is read once a direction.
    """
    rows = tokens * top_k
    flops = 6.0 * rows * hidden * hidden
    weights = PACKED * 3 * hidden * hidden * used
    token, row = BF16 * tokens * hidden, BF16 * rows * hidden
    pair = weights + token + (2 + 1 + 1) * row  # gate_up, activation, output
    forward = weights + 2 * token + 2 * (2 + 1 + 1) * row
    # activation's gradient, gate_up again, its gradient, rows of the input's gradient
    backward = weights + 2 * token + (2 + 2 + 4 + 2) * row
    return {
        "forward": (flops, forward),
        "both": (2 * flops, forward + backward),
        "pair": (flops, pair),
        "pair_grad": (flops, pair),
    }
