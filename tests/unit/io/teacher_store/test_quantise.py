import math

import numpy as np
import pytest

from nexus_cli.io.teacher_store import quantise

# Shape letters: M held positions, K kept entries, T temperatures of the tail.


def nats(*values):
    return np.array([values], np.float32)


def test_a_ratio_is_counted_in_sixteenths_of_a_nat_to_the_nearest():
    falls = [0, 1 / 16, 0.09, 0.0938, 3.99, 15.94, 15.97, 40, math.inf]
    codes = quantise.ratio_codes(nats(*(-0.3 - fall for fall in falls)))
    assert codes.dtype == np.uint8
    assert codes.tolist() == [[0, 1, 1, 2, 64, 255, 255, 255, 255]]


def test_a_tail_is_counted_from_the_likeliest_token_at_every_temperature():
    first = -0.5
    tails = nats(-2.0, 1.5, 6.0)
    low, mid, high = quantise.tail_codes(tails, np.array([first], np.float32))
    assert low.tolist() == [round(16 * (-2.0 + 0.5 + 12))]
    assert mid.tolist() == [round(16 * (1.5 + 0.25 + 4))]
    assert high.tolist() == [round(16 * (6.0 + 0.125 + 2))]
    assert low.dtype == mid.dtype == high.dtype == np.uint16


def test_no_tail_is_told_from_the_smallest():
    tails_MT = np.array([[-np.inf] * 3, [-80, -40, -20]], np.float32)
    first_M = np.zeros(2, np.float32)
    codes = quantise.tail_codes(tails_MT, first_M)
    assert [code.tolist() for code in codes] == [[0, 1]] * 3
    logprobs_MK, tails_MT = quantise.logprobs_of(np.zeros((2, 1), np.uint8), None, codes)
    assert np.isneginf(tails_MT[0]).all()
    assert logprobs_MK[0] == 0
    # The floors; at T = 1 it is a mass of 7e-6, which no loss feels.
    assert tails_MT[1].tolist() == pytest.approx([-11.9375, -3.9375, -1.9375], abs=1e-5)


def test_a_tail_over_the_largest_vocabulary_fits():
    """A uniform teacher of 16 million tokens: T = 4 makes the tail's sum largest."""
    size = 16_842_496
    first = -math.log(size)
    tails = nats(*(math.log(size - 1) + first / t for t in (1, 2, 4)))
    codes = quantise.tail_codes(tails, np.array([first], np.float32))
    _, read_MT = quantise.logprobs_of(np.zeros((1, 1), np.uint8), None, codes)
    np.testing.assert_allclose(read_MT, tails, atol=1 / 16)


def test_kept_entries_and_the_tail_make_one():
    rng = np.random.default_rng(0)
    ratio_MK = np.cumsum(rng.integers(12, size=(500, 20)), axis=1).astype(np.uint8)
    ratio_MK[:, 0] = 0
    used_MK = np.arange(20) < rng.integers(1, 21, size=(500, 1))
    codes = [rng.integers(400, size=500).astype(np.uint16) for _ in range(3)]
    logprobs_MK, tails_MT = quantise.logprobs_of(ratio_MK, used_MK, codes)
    assert logprobs_MK.dtype == tails_MT.dtype == np.float32
    for m in range(500):
        parts = [math.exp(-int(code) / 16) for code in ratio_MK[m, used_MK[m]]]
        tail = math.exp(int(codes[0][m]) / 16 - 12) if codes[0][m] else 0.0
        whole = math.fsum([*parts, tail])
        assert sum(map(math.exp, logprobs_MK[m])) + math.exp(tails_MT[m, 0]) == pytest.approx(
            1, abs=1e-6
        )
        assert np.isneginf(logprobs_MK[m, ~used_MK[m]]).all()
        expected = [math.log(part / whole) for part in parts]
        assert logprobs_MK[m, used_MK[m]].tolist() == pytest.approx(expected, abs=2e-6)
        for column, (temperature, offset) in enumerate([(1, 12), (2, 4), (4, 2)]):
            code = int(codes[column][m])
            said = code / 16 - offset - math.log(whole) / temperature if code else -math.inf
            assert tails_MT[m, column] == pytest.approx(said, abs=2e-6)


def test_an_nll_is_right_to_a_128th_and_the_mean_of_many_to_a_ten_thousandth():
    nll_M = np.random.default_rng(0).exponential(2.05, 400_000).astype(np.float32)
    codes_M = quantise.nll_codes(nll_M)
    assert codes_M.dtype == np.uint16
    assert not (codes_M & 15).any(), "four bits are dropped"
    read_M = quantise.nll_of(codes_M).astype(np.float64)
    # 1/128 of the value, rounded to float16 before, and float16's smallest numbers below 6e-5.
    assert (np.abs(read_M - nll_M) <= nll_M * (1 / 128 + 1 / 2048) + 1e-6).all()
    assert read_M.mean() == pytest.approx(nll_M.mean(dtype=np.float64), rel=1e-4)


def test_an_nll_of_nothing_is_nothing():
    assert quantise.nll_of(quantise.nll_codes(np.array([0.0, -1e-7], np.float32))).tolist() == [
        0,
        0,
    ]
