"""The NumPy backend's own: compiled loops beside the portable code, and threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import subgen_numpy
from numpy.typing import NDArray
from subgen_numpy import _absorbing, _attention, _merging, _rounding, _threads, _words

import subgen
from subgen import absorbing, backends
from subgen._checks import MOST_TOKENS
from subgen.absorbing import Absorbed, Absorption, Dithers, Exact
from subgen.backends import PORTABLE, Operations
from subgen.merging import Means, bands
from subgen.rounding import Codes, dither

NUMPY = subgen_numpy.BACKEND.operations
OPS = Operations(**NUMPY)
SEED = 20240612

needs_loops = pytest.mark.skipif(_absorbing.compiled("absorbing") is None, reason="numba or SciPy is not installed")


@pytest.fixture
def small_is_worth_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads for whatever comes."""
    for module in (_attention, _rounding):
        monkeypatch.setattr(module, "_WORTH_A_THREAD", 1)
    for module in (_absorbing, _merging):
        monkeypatch.setattr(module, "WORTH_A_THREAD", 1)


def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_absorbing, _attention, _merging, _rounding):
        monkeypatch.setattr(module, "compiled", lambda what: None)


def given(
    clusters: int,
    *,
    streams: int = 2,
    dims: tuple[int, int] = (16, 24),
    room: tuple[int, int] = (3, 12),
    dtype: Any = np.float32,
    nearest: float | None = None,
    asked: float = 1.0,
    often: int = 1,
) -> tuple[Means, Exact]:
    """Clusters and exact tokens for `absorb`; a share of the clusters remembers another."""
    rng = np.random.default_rng(SEED)
    (dim, value_dim), (sink, window) = dims, room

    def normal(*shape: int) -> NDArray[Any]:
        return rng.normal(size=shape).astype(dtype)

    counts = rng.integers(1, 9, (streams, clusters)) * often
    others = None
    if nearest is not None:
        others = (np.arange(clusters) + rng.integers(1, clusters, (streams, clusters))) % clusters
        others = np.where(rng.random((streams, clusters)) < nearest, others, -1).astype(np.int32)
    held = Means(
        keys=normal(streams, clusters, dim) + 1,
        values=normal(streams, clusters, value_dim),
        counts=counts,
        spread=(counts > 1)[:, :, None] * rng.random((streams, clusters, bands(dim))).astype(dtype),
        importance=rng.random((streams, clusters)).astype(dtype) + dtype(0.1),
        nearest=others,
    )
    keys, values = normal(streams, sink + window, dim) + 1, normal(streams, sink + window, value_dim)
    wide = np.float32 if dtype is np.float16 else dtype
    queries = PORTABLE["quantize"](normal(streams, window, dim).astype(wide), wide)
    return held, Exact(keys, values, queries, tuple(bool(x) for x in rng.random(window) < asked))


def absorbed_by(
    absorb: Callable[..., Absorbed], held: Means, exact: Exact, leave: int, most: int, coded: bool = False
) -> dict[str, Any]:
    dithers = Dithers(*(dither(1, what, 9) for what in range(4)))
    got = absorb(held, exact, Absorption(leave, 0.7, most, None, dithers, coded), OPS)
    settled = got.settled
    of_means = (settled.key_codes, settled.value_codes)
    return {
        **{f"{name}{i}": getattr(x, name) for i, x in enumerate(of_means) for name in ("codes", "scales") if x},
        "keys": settled.keys,
        "values": settled.values,
        "spread": settled.spread,
        "importance": settled.importance,
        "codes": settled.queries.codes,
        "scales": settled.queries.scales,
        "counts": got.counts,
        "nearest": got.nearest,
        "moved": got.moved,
    }


def portable_absorb(held: Means, exact: Exact, told: Absorption, _: Any) -> Absorbed:
    return absorbing.absorb(held, exact, told, Operations())


CASES: dict[str, dict[str, Any]] = {
    "all compared": {},
    "more than 32 bits count": {"often": 2**40, "nearest": 0.8},
    "one stream": {"streams": 1, "nearest": 0.9},
    "some remember": {"streams": 3, "nearest": 0.8},
    "few remember": {"nearest": 0.2},
    "float64": {"dtype": np.float64, "nearest": 0.8},
    "one band": {"dims": (6, 5), "nearest": 0.8},
    "no sinks": {"room": (0, 7), "nearest": 0.8},
    "some without a query": {"asked": 0.5, "nearest": 0.8},
    "none with a query": {"asked": 0.0, "nearest": 0.8},
    "more than a block": {"clusters": 330},
}


@needs_loops
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("most", [1, 30, 43])
def test_compiled_loops_absorb_as_the_portable_code(case: dict[str, Any], most: int) -> None:
    held, exact = given(**{"clusters": 40, **case})
    n, leave = held.counts.shape[1], 5
    most += n - 40
    arrays = *held.arrays()[:5], exact.keys, exact.values
    before = [x.copy() for x in arrays]
    got = absorbed_by(NUMPY["absorb"], held, exact, leave, most)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y, err_msg="an argument was written to")
    expected = absorbed_by(portable_absorb, held, exact, leave, most)
    # Sums in another order: 2^-24 of float32 a few dozen times, on numbers of order 1.
    tolerance = 1e-5 if exact.keys.dtype == np.float32 else 1e-12
    for name, x in expected.items():
        if x is None or not np.issubdtype(x.dtype, np.floating):
            np.testing.assert_array_equal(got[name], x, err_msg=name)
        else:
            np.testing.assert_allclose(got[name], x, rtol=tolerance, atol=tolerance, err_msg=name)
        assert x is None or got[name].dtype == x.dtype, name


@needs_loops
@pytest.mark.parametrize("asked", [0.0, 0.5, 1.0])
def test_compiled_loops_absorb_float16_as_the_portable_code(asked: float) -> None:
    held, exact = given(40, nearest=0.8, dtype=np.float16, asked=asked)
    got = absorbed_by(NUMPY["absorb"], held, exact, 5, 30)
    expected = absorbed_by(portable_absorb, held, exact, 5, 30)
    for name, x in expected.items():
        assert got[name].dtype == x.dtype, name
        if x.dtype == np.float16:
            # A number that lies on the edge of another, to the rounding of its sums, and those just below a power of 2.
            assert (got[name] != x).mean() < 0.002, name
            np.testing.assert_allclose(got[name], x, rtol=2.0**-9, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], x, err_msg=name)


@needs_loops
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_compiled_loops_absorb_into_means_in_8_bits(dtype: type) -> None:
    held, exact = given(40, nearest=0.8, dtype=dtype)
    wide = np.float32 if dtype is np.float16 else dtype
    codes = (PORTABLE["quantize"](x.astype(wide), dtype) for x in (held.keys, held.values))
    held = replace(held, **dict(zip(("keys", "values"), codes, strict=True)))
    got = absorbed_by(NUMPY["absorb"], held, exact, 5, 30, coded=True)
    expected = absorbed_by(portable_absorb, held, exact, 5, 30, coded=True)
    for name, x in expected.items():
        assert got[name].dtype == x.dtype, name
        assert got[name].shape == x.shape, name
        if name in ("codes0", "codes1"):
            # A number that lies on the edge of a code, to the rounding of its sums.
            assert (got[name] != x).mean() < 0.002, name
            np.testing.assert_allclose(got[name], x, atol=1, err_msg=name)
        else:
            tolerance = 2.0**-9 if x.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(got[name], x, rtol=tolerance, atol=1e-5, err_msg=name)


@needs_loops
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scales", [np.float16, np.float32, np.float64])
def test_compiled_loops_round_to_8_bits_as_the_portable_code(dtype: type, scales: type) -> None:
    """To the last bit: also zeros, what was read from codes, equal magnitudes, and scales beyond their dtype."""
    rng = np.random.default_rng(SEED)
    x = (rng.normal(size=(3, 50, 24)) * 10.0 ** rng.integers(-9, 7, size=(3, 50, 1))).astype(dtype)
    x[0, 0], x[1, 1, 0], x[2, 3] = 0, -0.0, -5
    x[1, 5] = rng.integers(-127, 128, 24) * dtype(0.03125)
    x[1, 6] *= dtype(1e30)
    drawn = dither(3, 1, 77)
    with np.errstate(all="ignore"):
        for numbers in (x, x[:, 3:40]):
            got, expected = NUMPY["quantize"](numbers, scales, drawn), PORTABLE["quantize"](numbers, scales, drawn)
            np.testing.assert_array_equal(got.codes, expected.codes)
            np.testing.assert_array_equal(got.scales, expected.scales)
            assert got.scales.dtype == expected.scales.dtype


@needs_loops
@pytest.mark.parametrize("how", ["by an instruction, if there is one", "by bits"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_all_words_of_16_bits_are_widened(how: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    import numba
    from subgen_numpy import _compiled_words

    if how == "by bits":
        monkeypatch.setattr(_compiled_words, "FLOAT16_INSTRUCTIONS", "none")
    widen, kind = _compiled_words.widen, np.int16 if dtype is np.float16 else np.uint16
    words = np.arange(2**16).astype(np.uint16)
    got, expected = np.empty(words.size, np.float32), words.view(dtype).astype(np.float32)

    @numba.njit
    def widen_all(words: Any, numbers: Any) -> None:
        for i in range(words.size):
            numbers[i] = widen(words[i])

    widen_all(words.view(kind), got)
    odd = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), odd)
    np.testing.assert_array_equal(got[~odd].view(np.int32), expected[~odd].view(np.int32))
    if dtype is not np.float16:
        np.testing.assert_array_equal(_words.widened(words, np.float32).view(np.int32), words.astype(np.int32) << 16)


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
    from subgen_numpy import _compiled_words

    narrow, x = _compiled_words.narrow, numbers_to_round()
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
    stored = np.dtype(dtype) if dtype is np.float16 else _words.BFLOAT16
    np.testing.assert_array_equal(_words.narrowed(x[~odd], stored).view(got.dtype), expected[~odd])


@needs_loops
@pytest.mark.usefixtures("small_is_worth_threads")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_compiled_loops_dither_to_16_bits(dtype: Any) -> None:
    """To the last bit of what the portable code says, with the exact power of two below a number."""
    x = numbers_to_round()
    x = np.tile(x[: x.size // 7 * 7].reshape(-1, 7), (3, 1, 1))
    drawn, info = dither(3, 1, 77), ml_dtypes.finfo(dtype)
    got = np.zeros((3, x.shape[1] + 2, 7), np.float16 if dtype is np.float16 else _words.BFLOAT16)
    _rounding.round_by_loops(x, drawn, got[:, :-2])
    assert not got[:, -2:].any()
    largest, smallest = np.float32(info.max), np.float32(info.smallest_normal)
    with np.errstate(all="ignore"):
        power = np.ldexp(np.float32(1), np.frexp(np.maximum(np.abs(x), smallest))[1] - 1).astype(np.float32)
        moved = x + (drawn(x) - np.float32(0.5)) * (power * np.float32(info.eps))
        nearest = np.clip(x, -largest, largest).astype(dtype)
        expected = np.where(nearest.astype(np.float32) == x, nearest, np.clip(moved, -largest, largest).astype(dtype))
        finite = np.isfinite(x)
    np.testing.assert_array_equal(got[:, :-2].view(dtype)[finite], expected[finite])
    assert np.isnan(got[:, :-2].view(dtype)[np.isnan(x)]).all()
    np.testing.assert_array_equal(got[:, :-2].view(dtype)[np.isinf(x)], np.sign(x[np.isinf(x)]) * largest)


@needs_loops
def test_compiled_loops_take_streams_that_lie_apart() -> None:
    held, exact = given(40, nearest=0.8)
    expected = absorbed_by(NUMPY["absorb"], held, exact, 5, 30)
    loops: Any = _absorbing.compiled("absorbing")
    kinds = len(loops.absorb.signatures)
    wide = [np.concatenate([x, x], axis=1)[:, : x.shape[1]] for x in (held.keys, exact.keys)]  # room behind each stream
    turned = np.asfortranarray(exact.values)
    unaligned = np.frombuffer(b"x" + held.values.tobytes(), np.float32, offset=1).reshape(held.values.shape)
    counts = held.counts.copy()
    counts.flags.writeable = False
    held = Means(wide[0], unaligned, counts, *held.arrays()[3:])
    got = absorbed_by(NUMPY["absorb"], held, replace(exact, keys=wide[1], values=turned), 5, 30)
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    assert len(loops.absorb.signatures) == kinds, "compiled anew for another kind of array"


@needs_loops
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("clusters", "most"), [(214, 150), (48, 37), (812, 780), (40, 1)])
@pytest.mark.parametrize("nearest", [None, 0.7])
def test_compiled_loops_merge_as_numpy_does(
    dtype: type, clusters: int, most: int, nearest: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    means = given(clusters, streams=3, dims=(16, 16), dtype=dtype, nearest=nearest)[0]
    if nearest is None:  # then all products are BLAS's, and ties are ties for both
        means.keys[:, 5:25], means.values[:, 5:25] = means.keys[:, 5:6], means.values[:, 5:6]
        means.importance[:, 5:25] = means.importance[:, 5:6]
    queries = np.random.default_rng(SEED).normal(size=(3, 40, 16)).astype(dtype)
    metric, unit = queries.swapaxes(1, 2) @ queries / 40, np.ones(3, dtype)
    got, moved = NUMPY["merge_closest"](means, metric, unit, most, most)
    without_loops(monkeypatch)
    expected, there = NUMPY["merge_closest"](means, metric, unit, most, most)
    np.testing.assert_array_equal(moved, there)
    for x, y in zip(got.arrays(), expected.arrays(), strict=True):
        if x is not None:
            np.testing.assert_array_equal(x, y)


def spoil(held: Means, exact: Exact, how: str) -> None:
    if how == "free places":
        held.counts[1, 3] = 0
        for x in (held.keys, held.values, held.spread, held.importance):
            x[1, 3] = 0
    elif how == "no importance":
        held.importance[1, 7] = 0
    elif how == "large keys":
        held.keys[1] *= 1e17
        exact.keys[1] *= 1e17
    elif how == "large queries":
        exact.queries.scales[1] = 1e30
    elif how == "no query counts":
        exact.queries.codes[:] = 0


@needs_loops
@pytest.mark.parametrize("how", ["free places", "no importance", "large keys", "large queries", "no query counts"])
def test_whatever_loops_leave_alone_is_absorbed_too(how: str) -> None:
    """The second stream, as the portable code does it; the first, as it is without such a neighbour."""
    held, exact = given(40)
    plain = absorbed_by(NUMPY["absorb"], held, exact, 5, 30)
    spoil(held, exact, how)
    with np.errstate(all="ignore"):
        got = absorbed_by(NUMPY["absorb"], held, exact, 5, 30)
        expected = absorbed_by(absorbing.absorb, held, exact, 5, 30)
    assert got.pop("nearest") is expected.pop("nearest") is plain.pop("nearest") is None
    for name, x in expected.items():
        assert np.isfinite(got[name]).all(), name
        if how != "no query counts":  # which is of both streams, and loops do it: the metric has no direction
            np.testing.assert_array_equal(got[name][1], x[1], err_msg=name)
            np.testing.assert_array_equal(got[name][0], plain[name][0], err_msg=name)


def test_rounding_to_8_bits_is_that_of_the_portable_code() -> None:
    rng = np.random.default_rng(SEED)
    x = rng.normal(size=(3, 40, 9)).astype(np.float32) * np.float32(10.0) ** rng.integers(-30, 30, (3, 40, 1))
    hard = [x, np.round(x * 2) / 2, np.zeros_like(x), np.full_like(x, 1e-44), np.full_like(x, 3e38)]
    hard.append(np.where(rng.random((3, 40, 1)) < 0.2, 0, x).astype(np.float32))
    for y in hard:
        for dtype in (np.float32, np.float16, np.float64):
            for uniform in (None, dither(3, 1, 2)):
                with np.errstate(over="ignore", invalid="ignore"):
                    got, expected = NUMPY["quantize"](y, dtype, uniform), PORTABLE["quantize"](y, dtype, uniform)
                np.testing.assert_array_equal(got.codes, expected.codes)
                np.testing.assert_array_equal(got.scales, expected.scales)
                assert got.scales.dtype == dtype


@needs_loops
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 32])
@pytest.mark.parametrize(
    ("clusters", "n", "dims"), [(0, 1, (8, 8)), (3, 3, (4, 8)), (30, 43, (12, 7)), (64, 64, (64, 32))]
)
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_compiled_loops_attend_as_numpy_does(
    rows: int, clusters: int, n: int, dims: tuple[int, int], stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(SEED)
    keys, values = (rng.normal(size=(3, n + 5, dim)).astype(stored)[:, :n] for dim in dims)
    counts = rng.integers(0, 5, (3, clusters)).astype(np.int64)
    spread = rng.random((3, clusters, 4)).astype(stored)
    queries = rng.normal(size=(3, rows, dims[0])).astype(np.float32)
    got = NUMPY["sketch_attention"](queries, keys, values, counts, spread)
    without_loops(monkeypatch)
    expected = NUMPY["sketch_attention"](queries, keys, values, counts, spread)
    # Logits of up to 40 here: units of 2^-18 of theirs, a few of them, are errors of weights.
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=4e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=2e-6)


@needs_loops
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize(
    ("clusters", "n", "dims"), [(0, 1, (8, 8)), (3, 3, (4, 8)), (30, 13, (12, 7)), (64, 64, (64, 32))]
)
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_compiled_loops_attend_to_means_in_8_bits(
    rows: int, clusters: int, n: int, dims: tuple[int, int], stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(SEED)
    keys, values = (rng.normal(size=(3, n + 5, dim)).astype(stored)[:, :n] for dim in dims)
    codes = [
        Codes(
            rng.integers(-127, 128, (3, clusters, dim)).astype(np.int8),
            rng.uniform(2**-9, 2**-6, (3, clusters)).astype(stored),
        )
        for dim in dims
    ]
    counts = rng.integers(0, 5, (3, clusters)).astype(np.int64)
    spread = rng.random((3, clusters, 4)).astype(stored)
    queries = rng.normal(size=(3, rows, dims[0])).astype(np.float32)
    given = (queries, keys, values, counts, spread, *codes, 0, OPS)
    got = NUMPY["coded_attention"](*given)
    without_loops(monkeypatch)
    expected = NUMPY["coded_attention"](*given)
    # As above.
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=4e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=2e-6)


@needs_loops
def test_compiled_loops_attend_to_nothing_and_to_what_is_no_number() -> None:
    rng = np.random.default_rng(SEED)
    keys, values, queries = (rng.normal(size=(4, 9, 8)).astype(np.float32) for _ in range(3))
    counts, spread = np.ones((4, 9), np.int64), np.zeros((4, 9, 4), np.float32)
    counts[0] = 0  # no place is taken
    keys[1, 8] = np.nan
    queries[2, 1] = np.nan
    keys[3, 4] *= 1e19
    outputs, logsumexp = NUMPY["sketch_attention"](queries[:, :4], keys, values, counts, spread)
    assert (outputs[0] == 0).all()
    assert (logsumexp[0] == -np.inf).all()
    assert np.isnan(outputs[1]).all()
    assert np.isnan(logsumexp[1]).all()
    assert np.isnan(outputs[2]).all(axis=-1).tolist() == [False, True, False, False]
    sees = queries[3, :4] @ keys[3, 4] > 0
    np.testing.assert_array_equal(outputs[3][sees], np.broadcast_to(values[3, 4], (4, 8))[sees])
    assert np.isfinite(outputs[3]).all()


@needs_loops
def test_logarithms_of_counts() -> None:
    loops: Any = _attention.compiled("attention")
    powers = 2 ** np.arange(62)
    counts = np.unique(np.concatenate([np.arange(5000), powers - 1, powers, [MOST_TOKENS]]))
    logs = np.empty(counts.size, np.float32)
    loops._logarithms(counts, logs)
    assert logs[0] == -np.inf
    assert logs[1] == 0
    np.testing.assert_allclose(logs[2:], np.log(counts[2:].astype(np.float64)), rtol=2e-7)


@pytest.mark.usefixtures("small_is_worth_threads")
@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("max_clusters", [30, 800])
def test_threads_change_nothing(loops: bool, max_clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loops:
        without_loops(monkeypatch)
    keys, values, queries = np.random.default_rng(SEED).normal(size=(3, 5, 1000, 8)).astype(np.float32)
    found = []
    for n in (1, 2, 7):
        with subgen_numpy.at_most(n):
            sketch = subgen.AttentionSketch(max_clusters, window=16)
            sketch.update(keys, values, queries)
            found.append((sketch.state.keys, sketch.state.counts, sketch.attend(queries[:, -3:])))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    _threads._default.cache_clear()
    assert _threads.threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    _threads._default.cache_clear()
    assert _threads.threads() >= 1
    with subgen_numpy.at_most(5):
        assert _threads.threads() == 5
        seen: list[int] = []
        other = threading.Thread(target=lambda: seen.append(_threads.threads()))
        other.start()
        other.join()
        assert seen == [_threads._default()], "another thread was told too"
    with pytest.raises(ValueError, match="threads must be an integer of at least 1, got 0"), subgen_numpy.at_most(0):
        pass
    _threads._default.cache_clear()


def test_streams_are_shared_out_and_errors_come_back() -> None:
    met = threading.Barrier(2, timeout=30)
    done: list[tuple[int, int]] = []

    def work(stream: int) -> None:
        if stream < 2:
            met.wait()  # both threads are at it
        done.append((stream, threading.get_ident()))

    with subgen_numpy.at_most(2):
        _threads.by_streams(work, 9, 9)
        assert sorted(stream for stream, _ in done) == list(range(9))
        assert len({thread for _, thread in done}) == 2

        def fail(stream: int) -> None:
            met.wait()
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("a helper's")
            raise ValueError("the caller's")

        with pytest.raises((RuntimeError, ValueError)):
            _threads.by_streams(fail, 2, 2)

        def fail_to_help(turns: NDArray[np.int64], waits: bool) -> None:
            met.wait()
            if not waits:
                raise RuntimeError("a helper's")
            while turns[1] < 1:
                pass

        with pytest.raises(RuntimeError, match="a helper's"):
            _threads.helped(fail_to_help, 2)
        done.clear()
        _threads.by_streams(work, 3, 3)  # as before
        assert len(done) == 3

    together = threading.Barrier(3, timeout=30)
    with subgen_numpy.at_most(3):
        _threads.by_streams(lambda stream: together.wait(), 3, 3)
        _threads.by_streams(lambda stream: None, 3, 1)


def test_blas_has_its_threads_back_whoever_comes_last() -> None:
    controlled = pytest.importorskip("threadpoolctl").ThreadpoolController().select(user_api="blas")

    def threads() -> set[int]:
        return {one["num_threads"] for one in controlled.info()}

    with controlled.limit(limits=2):
        assert threads() == {2}
        inside, leave = threading.Event(), threading.Event()

        def other() -> None:
            with _threads._blas_kept_to_one_thread():
                inside.set()
                leave.wait(30)

        thread = threading.Thread(target=other)
        with _threads._blas_kept_to_one_thread() as told:
            assert told
            thread.start()
            assert inside.wait(30)
            assert threads() == {1}
        assert threads() == {2}
        leave.set()
        thread.join()
        assert threads() == {2}
        with _threads._blas_kept_to_one_thread():
            assert threads() == {1}


SCRIPT = """
import os, signal, sys, warnings
import numpy as np, subgen, subgen_numpy
warnings.simplefilter("ignore")  # newer releases of Python warn of forks beside threads, as is meant here
from subgen_numpy import _absorbing, _attention
_attention._WORTH_A_THREAD = _absorbing.WORTH_A_THREAD = 1
keys, values, queries = np.random.default_rng(0).normal(size=(3, 4, 300, 8)).astype(np.float32)
def answer():
    with subgen_numpy.at_most(3):
        sketch = subgen.AttentionSketch(20, window=16)
        sketch.update(keys, values, queries)
        return sketch.attend(queries[:, -2:])
expected = answer()
child = os.fork() if hasattr(os, "fork") else 0
if child == 0:
    signal.alarm(60)
    assert np.array_equal(answer(), expected)
    print("the same", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
# Ends right behind work of threads.
answer()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_forked_process_has_threads_of_its_own_and_all_end_well() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the same\n", "")


def test_the_operations_are_found() -> None:
    assert set(NUMPY) <= set(PORTABLE)
    assert backends.operations_for(np.zeros(1)).absorb is NUMPY["absorb"]
    assert isinstance(PORTABLE["quantize"](np.zeros((1, 1, 1)), np.float64), Codes)
