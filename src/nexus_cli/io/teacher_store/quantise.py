"""The numbers of a distribution as small codes; the format's arithmetic.

Every log-probability is kept relative to the likeliest token's, in steps of 1/16 nat, and so is
the tail. Read back, they are divided by their sum: kept entries and tail make one by
construction, and the likeliest token's probability stays precise where it is near one.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# Shape letters in this file: M held positions, K kept entries, T temperatures of the tail.

TEMPERATURES: Final = (1, 2, 4)
RATIO_STEPS: Final = 16  # a nat: adds about 4e-5 nats of KL
LAST_CODE: Final = 255  # this far below the likeliest token, or further
TAIL_OFFSETS: Final = (12.0, 4.0, 2.0)  # nats: what is usual then fits one byte
NO_TAIL: Final = 0
NLL_BITS_DROPPED: Final = 4  # of float16's ten: 1/128 of the value, and right on average


def ratio_codes(logprobs_MK: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Distance below the likeliest token in steps, at most 255; unused entries get 255."""
    steps_MK = logprobs_MK[:, :1] - logprobs_MK
    steps_MK *= RATIO_STEPS
    np.rint(steps_MK, out=steps_MK)
    np.minimum(steps_MK, LAST_CODE, out=steps_MK)
    return steps_MK.astype(np.uint8)


def tail_codes(
    tails_MT: NDArray[np.float32], first_M: NDArray[np.float32]
) -> list[NDArray[np.uint16]]:
    """One array a temperature; 0 where there is no tail.

    Args:
        tails_MT: ``log sum p^(1/T)`` over the tail.
        first_M: log-probability of the likeliest token.
    """
    codes = []
    for column, (temperature, offset) in enumerate(zip(TEMPERATURES, TAIL_OFFSETS, strict=True)):
        ratio_M = tails_MT[:, column] - first_M / temperature
        code_M = np.clip(np.rint(RATIO_STEPS * (ratio_M + offset)), 1, 0xFFFF)
        codes.append(np.where(np.isneginf(ratio_M), NO_TAIL, code_M).astype(np.uint16))
    return codes


def logprobs_of(
    ratio_MK: NDArray[np.uint8], used_MK: NDArray[np.bool_] | None, tails: list[NDArray[Any]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the codes say.

    Args:
        ratio_MK: of :func:`ratio_codes`.
        used_MK: which entries are kept; ``None`` if all.
        tails: of :func:`tail_codes`.

    Returns:
        Log-probabilities ``[M, K]``, ``-inf`` where not used, and tails ``[M, T]``.
    """
    logprobs_MK = ratio_MK.astype(np.float32)
    logprobs_MK *= np.float32(-1 / RATIO_STEPS)
    if used_MK is not None:
        np.copyto(logprobs_MK, -np.inf, where=~used_MK)
    tails_MT = np.empty((len(ratio_MK), len(TEMPERATURES)), np.float32)
    for column, (code_M, offset) in enumerate(zip(tails, TAIL_OFFSETS, strict=True)):
        ratio_M = code_M.astype(np.float32) / np.float32(RATIO_STEPS) - np.float32(offset)
        tails_MT[:, column] = np.where(code_M == NO_TAIL, -np.inf, ratio_M)
    mass_M = np.exp(logprobs_MK).sum(1) + np.exp(tails_MT[:, 0])
    log_mass_M = np.log(mass_M)
    logprobs_MK -= log_mass_M[:, None]
    tails_MT -= log_mass_M[:, None] / np.array(TEMPERATURES, np.float32)
    return logprobs_MK, tails_MT


def nll_codes(nll_M: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of a float16, rounded to six bits of mantissa.

    Rounding of one is 1/128 of it at most, to either side and a half to even, so that the mean
    over a store's tokens is right; the dropped bits would be a tenth of a byte of noise each.
    """
    half, kept = np.uint16(1 << (NLL_BITS_DROPPED - 1)), np.uint16(-1 << NLL_BITS_DROPPED & 0xFFFF)
    bits_M = np.maximum(nll_M, 0).astype(np.float16).view(np.uint16)
    odd_M = bits_M >> np.uint16(NLL_BITS_DROPPED) & np.uint16(1)
    return (bits_M + (half - np.uint16(1)) + odd_M) & kept


def nll_of(codes_M: NDArray[np.uint16]) -> NDArray[np.float32]:
    """What :func:`nll_codes` kept, in nats."""
    return codes_M.view(np.float16).astype(np.float32)
