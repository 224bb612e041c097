"""Compiled loops that round to int8 and to 16 bits, and the words of 16 bits, beside the portable code."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import subgen_numpy
from numpy.typing import NDArray
from states import SEED
from subgen_numpy import BFLOAT16, _float16
from subgen_numpy.rounding import quantize_by_loops, quantize_to_nearest, round_by_loops
from switches import needs_loops, threads_for_all

from subgen.default.quantization import draw_dithers, quantize

DITHER = draw_dithers(3, [77])[0].keys


@needs_loops
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scales", [np.float16, np.float32, np.float64])
def test_compiled_loops_round_to_int8_as_the_portable_code(dtype: type, scales: type) -> None:
    """To the last bit: also zeros, what was dequantized, equal magnitudes, and scales beyond their dtype."""
    rng = np.random.default_rng(SEED)
    x = (rng.normal(size=(3, 50, 24)) * 10.0 ** rng.integers(-9, 7, size=(3, 50, 1))).astype(dtype)
    x[0, 0], x[1, 1, 0], x[2, 3] = 0, -0.0, -5
    x[1, 5] = rng.integers(-127, 128, 24) * dtype(0.03125)
    x[1, 6] *= dtype(1e30)
    with np.errstate(all="ignore"):
        for numbers in (x, x[:, 3:40]):
            got, expected = quantize_by_loops(numbers, scales, DITHER), quantize(numbers, scales, DITHER)
            np.testing.assert_array_equal(got.codes, expected.codes)
            np.testing.assert_array_equal(got.scales, expected.scales)
            assert got.scales.dtype == expected.scales.dtype


def test_rounding_to_int8_is_that_of_the_portable_code() -> None:
    rng = np.random.default_rng(SEED)
    x = rng.normal(size=(3, 40, 9)).astype(np.float32) * np.float32(10.0) ** rng.integers(-30, 30, (3, 40, 1))
    hard = [x, np.round(x * 2) / 2, np.zeros_like(x), np.full_like(x, 1e-44), np.full_like(x, 3e38)]
    hard.append(np.where(rng.random((3, 40, 1)) < 0.2, 0, x).astype(np.float32))
    loops = subgen_numpy.compiled("round") is not None
    for y in hard:
        for dtype in (np.float32, np.float16, np.float64):
            with np.errstate(over="ignore", invalid="ignore"):
                pairs = [(quantize_to_nearest(y, dtype), quantize(y, dtype))]
                if loops:
                    pairs.append((quantize_by_loops(y, dtype, DITHER), quantize(y, dtype, DITHER)))
            for got, expected in pairs:
                np.testing.assert_array_equal(got.codes, expected.codes)
                np.testing.assert_array_equal(got.scales, expected.scales)
                assert got.scales.dtype == dtype


@needs_loops
@pytest.mark.parametrize("how", ["by an instruction, if there is one", "by bits"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_all_words_of_16_bits_are_upcast(how: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    import numba
    from subgen_numpy import _numba_float16

    if how == "by bits":
        monkeypatch.setattr(_numba_float16, "FLOAT16_INSTRUCTIONS", "none")
    upcast, kind = _numba_float16.upcast, np.int16 if dtype is np.float16 else np.uint16
    words = np.arange(2**16).astype(np.uint16)
    got, expected = np.empty(words.size, np.float32), words.view(dtype).astype(np.float32)

    @numba.njit
    def widen_all(words: Any, numbers: Any) -> None:
        for i in range(words.size):
            numbers[i] = upcast(words[i])

    widen_all(words.view(kind), got)
    odd = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), odd)
    np.testing.assert_array_equal(got[~odd].view(np.int32), expected[~odd].view(np.int32))
    if dtype is not np.float16:
        np.testing.assert_array_equal(_float16.upcast(words, np.float32).view(np.int32), words.astype(np.int32) << 16)


def numbers_to_round() -> NDArray[np.float32]:
    """Of any magnitude, halfway between others, just below powers of two, and beyond all."""
    rng = np.random.default_rng(SEED)
    some = rng.normal(size=4000) * 10.0 ** rng.integers(-40, 38, 4000)
    halfway = (rng.integers(0, 2**16, 4000).astype(np.int32) << 16 | 0x8000).view(np.float32)
    of_half = np.float32(2.0) ** rng.integers(-28, 17, 4000) * (1 + rng.integers(0, 2**12, 4000) / np.float32(2**11))
    below = np.nextafter(np.float32(2.0) ** np.arange(-126, 128, dtype=np.float32), np.float32(0))
    edges = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e-45, -1e-45, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
    with np.errstate(over="ignore"):
        parts = [np.asarray(x).astype(np.float32) for x in (edges, some, of_half, -of_half, below)]
    return np.concatenate([*parts, halfway[np.isfinite(halfway)]])


@needs_loops
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_numbers_are_rounded_to_words_of_16_bits(dtype: Any) -> None:
    import numba
    from subgen_numpy import _numba_float16

    narrow, x = _numba_float16.narrow, numbers_to_round()
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    with np.errstate(invalid="ignore"):
        x = np.clip(x, -largest, largest)  # NaN stays
    got = np.empty(x.size, np.int16 if dtype is np.float16 else np.uint16)

    @numba.njit
    def narrow_all(numbers: Any, words: Any) -> None:
        for i in range(words.size):
            words[i] = narrow(numbers[i], words)

    narrow_all(x, got)
    expected, odd = x.astype(dtype).view(got.dtype), np.isnan(x)
    np.testing.assert_array_equal(np.isnan(got.view(dtype)), odd)
    np.testing.assert_array_equal(got[~odd], expected[~odd])
    stored = np.dtype(dtype) if dtype is np.float16 else BFLOAT16
    np.testing.assert_array_equal(_float16.saturating_cast(x[~odd], stored).view(got.dtype), expected[~odd])


@needs_loops
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_compiled_loops_dither_to_16_bits(dtype: Any) -> None:
    """To the last bit of what the portable code says, with the exact power of two below a number."""
    x = numbers_to_round()
    x = np.tile(x[: x.size // 7 * 7].reshape(-1, 7), (3, 1, 1))
    info = ml_dtypes.finfo(dtype)
    got = np.zeros((3, x.shape[1] + 2, 7), np.float16 if dtype is np.float16 else BFLOAT16)
    with threads_for_all():
        round_by_loops(x, DITHER, got[:, :-2])
    assert not got[:, -2:].any()
    largest, smallest = np.float32(info.max), np.float32(info.smallest_normal)
    with np.errstate(all="ignore"):
        power = np.ldexp(np.float32(1), np.frexp(np.maximum(np.abs(x), smallest))[1] - 1).astype(np.float32)
        moved = x + (DITHER(x) - np.float32(0.5)) * (power * np.float32(info.eps))
        nearest = np.clip(x, -largest, largest).astype(dtype)
        expected = np.where(nearest.astype(np.float32) == x, nearest, np.clip(moved, -largest, largest).astype(dtype))
        finite = np.isfinite(x)
    np.testing.assert_array_equal(got[:, :-2].view(dtype)[finite], expected[finite])
    assert np.isnan(got[:, :-2].view(dtype)[np.isnan(x)]).all()
    np.testing.assert_array_equal(got[:, :-2].view(dtype)[np.isinf(x)], np.sign(x[np.isinf(x)]) * largest)
