"""The CUDA kernels against the portable operations: executed on the CPU by emulation, and on a GPU if there is one."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cuda_emulation
import cuda_labs
import ml_dtypes
import numpy as np
import pytest
from cuda_labs import DTYPES, Lab
from subgen_cupy import (
    BACKEND,
    _absorbing,
    _attention,
    _decoding,
    _leaders,
    _merging,
    _operations,
    _rounding,
    _threefry,
    _torch,
    torch_backend,
)

import subgen
from subgen import _array, backends, merging
from subgen._array import dtype_name
from subgen.absorbing import Dithers, Exact, widened
from subgen.backends import PORTABLE
from subgen.mass import log_weights
from subgen.merging import Means
from subgen.rounding import Codes, dequantize, dither

# Sums of a few hundred float32 terms of order 1, in another order than the reference's.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=["emulation", pytest.param("gpu", marks=pytest.mark.gpu)])
def lab(request: pytest.FixtureRequest) -> Lab:
    return cuda_labs.gpu() if request.param == "gpu" else cuda_labs.emulation()


# Weighted attention


def written_out(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted attention in float64; weights of shape (streams, m, n)."""
    logits = queries.astype(np.float64) @ keys.astype(np.float64).swapaxes(1, 2)
    logits = np.where(np.isneginf(weights), -np.inf, logits + weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        peak = np.where(np.isneginf(logits).all(axis=-1), 0.0, logits.max(axis=-1))[..., None]
        p = np.exp(logits - peak)
        total = p.sum(axis=-1, keepdims=True)
        return np.where(total > 0, p @ values.astype(np.float64) / total, 0.0), (np.log(total) + peak)[..., 0]


def attention_case(rng: np.random.Generator, dtype: str, head_dim: int, value_dim: int, streams: int, rows: int) -> Any:
    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(DTYPES[dtype])

    def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
        return draw(streams, n, head_dim), draw(streams, n, value_dim)

    queries = rng.normal(size=(streams, rows, head_dim)).astype(np.float32)
    return queries, pairs


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [
        ("float32", 64, 64),
        ("float32", 128, 128),
        ("float32", 3, 5),
        ("float16", 80, 80),
        ("float16", 128, 128),
        ("bfloat16", 8, 64),
        ("bfloat16", 64, 64),
        ("bfloat16", 128, 128),
        ("bfloat16", 288, 256),
    ],
)
def test_a_decoding_step_over_exact_pairs_and_clusters(
    lab: Lab, dtype: str, head_dim: int, value_dim: int, seed: int
) -> None:
    lab = lab.seeded(seed)
    rng = np.random.default_rng(seed)
    streams, rows = 3, (4, 7, 5)[seed - 1]
    n, c = ((37, 53), (1, 300), (130, 1))[seed - 1]
    queries, pairs = attention_case(rng, dtype, head_dim, value_dim, streams, rows)
    keys, values = pairs(c + n)
    counts = rng.integers(0, 6, size=(streams, c)).astype(np.int64)
    counts[:, 0] = 1
    spread = rng.random((streams, c, merging.bands(head_dim))) * 0.2
    spread = spread.astype(DTYPES[dtype] if head_dim == value_dim else np.float32)
    # The front of a buffer with room behind it, which is not looked at.
    buffers = [lab.put(np.concatenate([x, np.full_like(x[:, : seed - 1], np.nan)], axis=1)) for x in (keys, values)]
    fronts = [x[:, : c + n] for x in buffers]
    got = _attention.attend(lab.device, lab.put(queries), *fronts, (lab.put(counts), lab.put(spread)))

    wide = queries.astype(np.float64)
    weights = np.concatenate([log_weights(wide, counts, spread), np.zeros((streams, rows, n))], axis=-1)
    outputs, logsumexp = written_out(wide, keys, values, weights)
    np.testing.assert_allclose(lab.get(got[0]), outputs, **TOLERANCE)
    np.testing.assert_allclose(lab.get(got[1]), logsumexp, **TOLERANCE)


def coded(rng: np.random.Generator, n: int, dim: int, dtype: str) -> Codes:
    """Two streams of vectors in 8 bits, all codes among them."""
    codes = rng.integers(-127, 128, size=(2, n, dim)).astype(np.int8)
    codes.reshape(-1)[:255] = np.arange(-127, 128)[: codes.size]
    return Codes(codes, (0.01 + rng.random((2, n)) / 64).astype(DTYPES[dtype]))


def put_codes(lab: Lab, x: Any) -> Any:
    """Arrays, or codes, of a lab."""
    return x.each(lab.put) if isinstance(x, Codes) else lab.put(x)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [("float32", 64, 64), ("float32", 3, 5), ("float16", 128, 128), ("bfloat16", 64, 64), ("bfloat16", 6, 288)],
)
def test_means_in_8_bits_are_read_as_they_are(lab: Lab, dtype: str, head_dim: int, value_dim: int, seed: int) -> None:
    lab = lab.seeded(seed)
    rng = np.random.default_rng(seed)
    n, c = ((37, 300), (1, 5))[seed - 1]
    queries, pairs = attention_case(rng, dtype, head_dim, value_dim, 2, 5)
    keys, values = pairs(n + 3)
    means = coded(rng, c, head_dim, dtype), coded(rng, c, value_dim, dtype)
    counts = rng.integers(0, 6, size=(2, c)).astype(np.int64)
    spread = (rng.random((2, c, merging.bands(head_dim))) * 0.2).astype(DTYPES[dtype])
    given = [put_codes(lab, x) for x in (queries, keys, values, counts, spread, *means)]
    given[1:3] = (x[:, :n] for x in given[1:3])  # behind them is room
    got = _attention.attend(lab.device, *given[:3], tuple(given[3:5]), codes=tuple(given[5:]))  # type: ignore[arg-type]
    whole = [
        np.concatenate([dequantize(of, np.float64), x[:, :n].astype(np.float64)], axis=1)
        for of, x in zip(means, (keys, values), strict=True)
    ]
    wide = queries.astype(np.float64)
    weights = np.concatenate([log_weights(wide, counts, spread), np.zeros((2, 5, n))], axis=-1)
    for mine, expected in zip(got, written_out(wide, *whole, weights), strict=True):
        np.testing.assert_allclose(lab.get(mine), expected, **TOLERANCE)


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_clusters_of_more_tokens_than_32_bits_count_are_weighed(lab: Lab, in_8_bits: bool) -> None:
    rng = np.random.default_rng(5)
    queries, pairs = attention_case(rng, "float32", 8, 8, 2, 3)
    keys, values = pairs(44)
    codes = (coded(rng, 40, 8, "float32"), coded(rng, 40, 8, "float32")) if in_8_bits else None
    counts = rng.integers(0, 6, size=(2, 40)) << rng.integers(0, 60, size=(2, 40))
    spread = (rng.random((2, 40, 4)) * 0.2).astype(np.float32)
    given = [x[:, 40:] if in_8_bits else x for x in (keys, values)]
    put = functools.partial(put_codes, lab)
    got = _attention.attend(
        lab.device,
        *map(put, (queries, *given)),
        (put(counts), put(spread)),
        codes=codes and (put(codes[0]), put(codes[1])),
    )
    if codes is not None:
        given = [np.concatenate([dequantize(a, np.float64), b], axis=1) for a, b in zip(codes, given, strict=True)]
    wide = queries.astype(np.float64)
    weights = np.concatenate([log_weights(wide, counts, spread), np.zeros((2, 3, 4))], axis=-1)
    for mine, expected in zip(got, written_out(wide, *given, weights), strict=True):
        # Logits of up to 60.
        np.testing.assert_allclose(lab.get(mine), expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 3), (1, 3)])
def test_log_weights_of_every_shape(lab: Lab, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    queries, pairs = attention_case(rng, "float32", 64, 64, 2, 3)
    keys, values = pairs(70)
    weights = rng.normal(size=(*shape, 70)).astype(np.float32)
    weights[..., rng.random(70) < 0.3] = -np.inf
    weights[-1, -1, :] = -np.inf
    keys[:, np.isneginf(weights).all(axis=(0, 1))] = np.nan  # what has no weight in any row is not looked at
    got = _attention.attend(lab.device, *map(lab.put, (queries, keys, values)), log_weights=lab.put(weights))
    expected = written_out(queries, np.nan_to_num(keys), values, np.broadcast_to(weights, (2, 3, 70)))
    np.testing.assert_allclose(lab.get(got[0]), expected[0], **TOLERANCE)
    np.testing.assert_allclose(lab.get(got[1]), expected[1], **TOLERANCE)
    assert np.isneginf(lab.get(got[1])[-1, -1])
    assert not lab.get(got[0])[-1, -1].any()


def test_logits_of_any_size(lab: Lab) -> None:
    rng = np.random.default_rng(5)
    queries, pairs = attention_case(rng, "float32", 64, 64, 1, 4)
    keys, values = pairs(40)
    weights = np.float32([[[1e4]], [[-1e4]]]) + np.zeros((2, 1, 40), dtype=np.float32)
    both = [np.concatenate([x, x]) for x in (queries * 30, keys, values)]
    got = _attention.attend(lab.device, *map(lab.put, both), log_weights=lab.put(weights))
    expected = written_out(*both, np.broadcast_to(weights, (2, 4, 40)))
    # Logits of order 1e4 in float32 are known to 1e-3: so are the weights, relatively.
    np.testing.assert_allclose(lab.get(got[0]), expected[0], rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(lab.get(got[1]), expected[1], rtol=1e-6)


def test_arrays_that_start_anywhere_and_lie_in_any_order(lab: Lab) -> None:
    rng = np.random.default_rng(6)
    queries, pairs = attention_case(rng, "bfloat16", 64, 64, 2, 4)
    keys, values = pairs(11)
    expected = written_out(queries, keys, values, np.zeros((2, 4, 11)))
    shifted = [lab.put(np.concatenate([x[..., :1], x], axis=-1))[..., 1:] for x in (queries, keys, values)]
    turned = [lab.put(np.ascontiguousarray(x.swapaxes(0, 1))).swapaxes(0, 1) for x in (queries, keys, values)]
    for arrays in (shifted, turned):
        got = _attention.attend(lab.device, *arrays)
        np.testing.assert_allclose(lab.get(got[0]), expected[0], **TOLERANCE)


def test_the_front_of_a_buffer_is_read_where_it_lies(lab: Lab) -> None:
    buffer = lab.put(np.zeros((3, 20, 8), dtype=np.float16))
    for view, copied in ((buffer, False), (buffer[:, :7], False), (buffer[1:, :7], False), (buffer[..., :4], True)):
        x, step = lab.device.streams(view)
        assert (lab.device.pointer(x) != lab.device.pointer(view)) == copied
        assert step == (20 * 4 if copied else 20 * 8)
    assert lab.device.streams(buffer[:1, :7])[1] == 7 * 8


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("n", [0, 1, 65])
def test_any_number_of_rows_and_of_pairs(lab: Lab, rows: int, n: int) -> None:
    rng = np.random.default_rng(rows)
    queries, pairs = attention_case(rng, "bfloat16", 64, 64, 1, rows)
    keys, values = pairs(3 + n)
    clusters = lab.put(np.ones((1, 3), np.int64)), lab.put(np.zeros((1, 3, 4), np.float32))
    got = _attention.attend(lab.device, *map(lab.put, (queries, keys, values)), clusters)
    expected = written_out(queries, keys, values, np.zeros((1, rows, n + 3)))
    np.testing.assert_allclose(lab.get(got[0]), expected[0], **TOLERANCE)
    np.testing.assert_allclose(lab.get(got[1]), expected[1], **TOLERANCE)


def test_a_decoding_step_is_two_launches_and_copies_nothing() -> None:
    lab = cuda_labs.emulation()
    rng = np.random.default_rng(7)
    queries, pairs = attention_case(rng, "bfloat16", 64, 64, 2, 4)
    keys, values = pairs(25)
    clusters = np.ones((2, 9), dtype=np.int64), np.zeros((2, 9, 4), dtype=DTYPES["bfloat16"])
    _attention.attend(lab.device, queries, keys[:, :18], values[:, :18], clusters)
    split, join = lab.device.launches  # type: ignore[attr-defined]
    assert (split.kernel, join.kernel) == ("attend_split", "attend_join")
    given = {x.ctypes.data for x in (queries, keys, values, *clusters)}
    assert given <= {int(x) for x in split.arguments if isinstance(x, np.uint64)}


# A token


@dataclass(frozen=True)
class Token:
    """What `subgen.decoding.decode` is given: a sketch, and a token with the queries of a group."""

    keys: Any
    values: Any
    counts: Any
    spread: Any
    key_codes: Codes | None
    value_codes: Codes | None
    queries: Codes
    n_means: int
    n_exact: int
    n_seen: int


def token_case(
    lab: Lab, dtype: str, n_exact: int, clusters: int, dims: tuple[int, int], group: int, in_8_bits: bool = False
) -> tuple[Token, list[np.ndarray]]:
    """A sketch of two streams with room for 12 exact tokens, of which 3 are sinks; behind, NaN. Queries, key, value."""
    rng = np.random.default_rng(n_exact)
    sink, window, n_seen = 3, 9, 1000 * bool(clusters) + n_exact

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(DTYPES[dtype])

    n_means = 0 if in_8_bits else clusters
    buffers = [draw(2, n_means + sink + window, dim) for dim in dims]
    for x in buffers:
        x[:, n_means + n_exact :] = np.nan
    spread = (rng.random((2, clusters, merging.bands(dims[0]))) * 0.2).astype(DTYPES[dtype])
    counts = rng.integers(0, 5, size=(2, clusters)).astype(np.int64)
    codes, scales = rng.integers(-127, 128, size=(2, window, dims[0])).astype(np.int8), rng.random((2, window))
    held = Token(
        *map(lab.put, (*buffers, counts, spread)),
        *(put_codes(lab, coded(rng, clusters, dim, dtype)) if in_8_bits else None for dim in dims),
        Codes(codes, scales.astype(np.float32)).each(lab.put),
        n_means,
        n_exact,
        n_seen,
    )
    return held, [draw(2, group, dims[0]), draw(2, 1, dims[0]), draw(2, 1, dims[1])]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("n_exact", "clusters", "dims", "group"),
    [(0, 0, (8, 8), 1), (2, 0, (64, 64), 4), (3, 40, (64, 64), 4), (11, 40, (8, 24), 3), (7, 300, (128, 128), 16)],
)
@pytest.mark.parametrize(("counted", "in_8_bits"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_token_is_taken_in_and_answered(
    lab: Lab, dtype: str, n_exact: int, clusters: int, dims: tuple[int, int], group: int, counted: bool, in_8_bits: bool
) -> None:
    """Whether the host says where the token goes, or memory on the device; and whatever means are in."""
    held, token = token_case(lab, dtype, n_exact, clusters, dims, group, in_8_bits)
    before = {name: lab.get(getattr(held, name)).copy() for name in ("keys", "values")}
    old_codes, old_scales = (lab.get(x).copy() for x in (held.queries.codes, held.queries.scales))
    counters = None
    if counted:
        counters = lab.put(np.zeros(2, np.int64))
        _decoding.count_tokens(lab.device, counters, held.n_exact, held.n_seen)
        # What is launched is the same for every token, so it cannot depend on these.
        stale = replace(held, n_exact=5, n_seen=77)
        decoded = _decoding.decode(lab.device, stale, *map(lab.put, token), 0.3, counters)
    else:
        decoded = _decoding.decode(lab.device, held, *map(lab.put, token), 0.3)
    assert decoded.keys is held.keys  # in place
    queries, *pair = token
    for name, row in zip(("keys", "values"), pair, strict=True):
        expected = before[name]
        expected[:, held.n_means + n_exact] = row[:, 0]
        np.testing.assert_array_equal(*(x.astype(np.float32) for x in (lab.get(getattr(decoded, name)), expected)))
    rows = queries.astype(np.float32) * np.float32(0.3)
    if n_exact >= 3:
        kept = PORTABLE["quantize"](rows[:, held.n_seen % group][:, None], np.dtype("float32"))
        old_codes[:, n_exact - 3], old_scales[:, n_exact - 3] = kept.codes[:, 0], kept.scales[:, 0]
    np.testing.assert_array_equal(lab.get(decoded.queries.codes), old_codes)
    np.testing.assert_array_equal(lab.get(decoded.queries.scales), old_scales)
    wide, used = rows.astype(np.float64), held.n_means + n_exact + 1
    counts, spread = lab.get(held.counts), lab.get(held.spread)
    weights = [np.zeros((2, group, n_exact + 1))]
    if clusters:
        weights.insert(0, log_weights(wide, counts, spread))
    keys, values = (lab.get(x)[:, :used].astype(np.float64) for x in (decoded.keys, decoded.values))
    if held.key_codes is not None and held.value_codes is not None:
        keys, values = (
            np.concatenate([dequantize(of.each(lab.get), np.float64), x], axis=1)
            for of, x in ((held.key_codes, keys), (held.value_codes, values))
        )
    expected, _ = written_out(wide, keys, values, np.concatenate(weights, axis=-1))
    outputs = lab.get(decoded.outputs)
    assert outputs.dtype == DTYPES[dtype]
    # Answers are rounded to the dtype of the input, once.
    unit = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
    np.testing.assert_allclose(outputs.astype(np.float64), expected, rtol=2e-5 + unit / 2, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_answer_beyond_the_dtype_is_its_largest_number(lab: Lab, dtype: str) -> None:
    held, (queries, key, value) = token_case(lab, dtype, 0, 0, (8, 8), 1)
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    value[0], value[1] = largest, -largest
    decoded = _decoding.decode(lab.device, held, *map(lab.put, (queries, key, value)), 1.0)
    np.testing.assert_array_equal(lab.get(decoded.outputs), np.broadcast_to(value, (2, 1, 8)))


# Threefry


def test_threefry_matches_the_known_answers_and_the_portable_words(lab: Lab) -> None:
    # The known-answer vectors of Random123 for threefry2x32, 20 rounds.
    ones, pi = 0xFFFFFFFF, (0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3)
    known = [
        ((0, 0, 0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones,) * 4, (0x1CB996FC, 0xBB002BE7)),
        (pi, (0xC4923A9C, 0x483DF7A0)),
    ]
    words = np.array([case[0] for case in known], dtype=np.int64).T
    got = _threefry.threefry(lab.device, tuple(lab.put(word) for word in words))
    assert [tuple(int(x) for x in pair) for pair in zip(*map(lab.get, got), strict=True)] == [case[1] for case in known]
    words = np.random.default_rng(0).integers(0, 1 << 32, size=(4, 7, 101))
    got = _threefry.threefry(lab.device, tuple(lab.put(word) for word in words))
    for mine, portable in zip(got, PORTABLE["threefry2x32"](*words), strict=True):
        np.testing.assert_array_equal(lab.get(mine), portable)


# Rounding


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 3])
def test_queries_in_8_bits_are_the_portable_ones(lab: Lab, dtype: str, group: int) -> None:
    rng = np.random.default_rng(14)
    x = rng.normal(size=(2, group, 11, 70)) * 10.0 ** rng.integers(-6, 4, size=(2, group, 11, 1))
    x = x.astype(DTYPES[dtype])
    x[0, 0, 3], x[1, 0, 2, ::2] = 0.0, 2.5
    wide = x.astype(np.float32)
    # Part of a block: its heads lie apart.
    for part, first in ((slice(0, 11), 0), (slice(4, 5), 7), (slice(0, 7), 2)):
        rows = lab.put(x.reshape(2 * group, 11, 70))[:, part]
        got = _rounding.query_codes(lab.device, rows, group, 0.3, first)
        expected = PORTABLE["query_codes"](wide[:, :, part], 0.3, first, np.dtype("float32"), backends.Operations())
        np.testing.assert_array_equal(lab.get(got.codes), expected.codes)
        np.testing.assert_array_equal(lab.get(got.scales), expected.scales)


# Leaders


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("seed", "n", "capacity", "head_dim", "delta"),
    [(1, 1, 8, 64, 1.0), (2, 45, 8, 2, 2.0), (3, 70, 40, 3, 3.0), (4, 33, 64, 80, 40.0), (5, 40, 8, 2, 0.0)],
)
def test_leaders_decide_as_the_portable_rule(
    lab: Lab, dtype: str, seed: int, n: int, capacity: int, head_dim: int, delta: float
) -> None:
    lab = lab.seeded(seed)
    rng = np.random.default_rng(seed)
    streams = 3
    # Small integers: every distance is exact, and ties abound.
    keys = rng.integers(-4, 5, size=(streams, n, head_dim)).astype(DTYPES[dtype])
    centres = rng.integers(-4, 5, size=(streams, capacity, head_dim)).astype(DTYPES[dtype])
    n_clusters = np.array([0, capacity // 2, capacity])
    got = _leaders.leaders(lab.device, *map(lab.put, (keys, centres, n_clusters)), delta)
    wide = np.float64 if dtype == "float64" else np.float32
    expected = PORTABLE["assign_leaders"](keys.astype(wide), centres.astype(wide), n_clusters, delta)
    np.testing.assert_array_equal(lab.get(got[0]), expected[0])
    np.testing.assert_array_equal(lab.get(got[1]), expected[1])


# Merging


def means_case(
    rng: np.random.Generator, streams: int, n: int, head_dim: int, value_dim: int, free: Sequence[float] = (0.1,)
) -> Means:
    """Clusters whose costs are exact in float32: small integers about a mean of zero, weights powers of two.

    A share of the places of each stream is free.
    """
    half = n // 2
    keys = rng.integers(-3, 4, size=(streams, half, head_dim))
    keys = np.concatenate([keys, -keys, np.zeros((streams, n - 2 * half, head_dim))], axis=1)
    counts = 2.0 ** rng.integers(0, 3, size=(streams, half))
    counts = np.concatenate([counts, counts, np.ones((streams, n - 2 * half))], axis=1)
    dead = rng.random((streams, half)) < np.array(free)[:, None]
    counts = np.where(np.concatenate([dead, dead, np.zeros((streams, n - 2 * half), bool)], axis=1), 0.0, counts)
    values = rng.integers(-3, 4, size=(streams, n, value_dim))
    spread = rng.integers(0, 4, size=(streams, n, merging.bands(head_dim)))
    importance = 2.0 ** rng.integers(-1, 2, size=(streams, n))
    order = rng.permutation(n)
    arrays = keys, values, counts, spread, importance
    means = Means(*(np.ascontiguousarray(x[:, order]).astype(np.float32) for x in arrays))
    return replace(means, counts=means.counts.astype(np.int64))


def remembering(rng: np.random.Generator, counts: np.ndarray, new: float) -> np.ndarray:
    """Some other that lives for each cluster to remember, but for a share of them, which are new."""
    nearest = np.full(counts.shape, -1, np.int32)
    for row, live in zip(nearest, counts > 0, strict=True):
        places = np.flatnonzero(live)
        for i in places if len(places) > 1 else ():
            row[i] = -1 if rng.random() < new else rng.choice(places[places != i])
    return nearest


def rounds_of_mutual_neighbours(
    costs: np.ndarray, surplus: int, compared: np.ndarray | None = None
) -> tuple[dict[int, int], list[int]]:
    """Second of each pair by its first, and the nearest of those in no pair: the matching of a stream, written out."""
    pairs: dict[int, int] = {}
    free = [True] * len(costs)
    while True:
        masked = np.where(np.array(free)[None, :] & (True if compared is None else compared), costs, np.inf)
        nearest = [int(np.argmin(row)) for row in masked]
        if surplus <= 0:
            break
        round_ = [
            (masked[i, j], i, j)
            for i, j in enumerate(nearest)
            if free[i] and i < j and nearest[j] == i and masked[i, j] < np.inf
        ]
        if not round_:
            break
        for _, i, j in sorted(round_)[:surplus]:
            pairs[i] = j
            free[i] = free[j] = False
        surplus -= min(surplus, len(round_))
    return pairs, [j if free[i] and masked[i, j] < np.inf else -1 for i, j in enumerate(nearest)]


def in_tiles(costs: np.ndarray) -> np.ndarray:
    """Costs in whole tiles."""
    room = (0, -costs.shape[2] % 128)
    return np.pad(costs, ((0, 0), room, room), constant_values=np.nan)


# The share of clusters that are new, if they remember their nearest others. With few, all are compared.
@pytest.mark.parametrize("new", [None, 0.3, 0.0])
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "most"), [(1, 1), (2, 1), (37, 30), (64, 20), (100, 60), (150, 149), (33, 40), (40, 1)])
def test_pairs_are_matched_as_written_out_with_many_ties(
    lab: Lab, n: int, most: int, seed: int, new: float | None
) -> None:
    lab = lab.seeded(seed)
    rng = np.random.default_rng(seed)
    streams = 2
    costs = rng.integers(0, 4 if seed % 2 else 1000, size=(streams, n, n)).astype(np.float32)
    costs = np.minimum(costs, costs.swapaxes(1, 2))
    counts = (rng.random((streams, n)) < 0.9).astype(np.int64)
    possible = (counts[:, :, None] > 0) & (counts[:, None, :] > 0) & ~np.eye(n, dtype=bool)
    costs[~possible] = np.inf
    remembered = compared = None
    given = costs
    if new is not None:
        remembered = remembering(rng, counts, new)
        live = counts > 0
        given = np.where(merging._compared(remembered, live, np.zeros((streams, 1))) | ~possible, costs, -costs)
        compared = merging._compared(remembered, live, live.sum(axis=1, keepdims=True) - most)
    places = min(n, most + 3)
    moved = lab.put(np.full((streams, n), -1))
    # The matching speaks for pairs by importance, of which there are few, and gives the same whatever it is.
    importance = lab.put(rng.integers(0, 5, size=(streams, n)).astype(np.float32))
    before = None if remembered is None else lab.put(remembered)
    known = lab.put(counts), importance, before
    matched = _merging.match(lab.device, lab.put(in_tiles(given)), *known, most, places, moved, True)
    source, other, moved = map(lab.get, (*matched[:2], moved))
    assert (matched[2] is None) == (new is None)
    for s in range(streams):
        live = [i for i in range(n) if counts[s, i] > 0]
        pairs, left = rounds_of_mutual_neighbours(costs[s], len(live) - most, None if compared is None else compared[s])
        gone = set(pairs.values())
        kept = [i for i in live if i not in gone]
        expected = [(i, pairs.get(i, -1)) for i in kept] + [(i, -2) for i in range(n) if i not in kept]
        assert list(zip(source[s].tolist(), other[s].tolist(), strict=True)) == expected[:places]
        place = {i: p for p, (i, _) in enumerate(expected)}
        place |= {j: place[i] for i, j in pairs.items()}
        assert moved[s].tolist() == [place[i] for i in range(n)]
        if remembered is not None:
            if len(live) <= most:
                left = remembered[s].tolist()
            nearest = [-1 if left[i] < 0 else place[left[i]] for i, _ in expected]
            assert lab.get(matched[2])[s].tolist() == nearest[:places]


@pytest.mark.parametrize("new", [None, 0.2])
@pytest.mark.parametrize(("n", "head_dim", "value_dim"), [(1, 8, 8), (31, 8, 3), (70, 64, 64)])
def test_costs_equal_the_portable_ones_to_the_last_bit(
    lab: Lab, n: int, head_dim: int, value_dim: int, new: float | None
) -> None:
    rng = np.random.default_rng(8)
    means = means_case(rng, 2, n, head_dim, value_dim)
    value_scale = np.float32([0.5, 2.0])
    root = rng.integers(-1, 2, size=(2, head_dim, head_dim)).astype(np.float32)
    compared = np.ones((2, n, n), bool)
    if new is not None:
        means = replace(means, nearest=remembering(rng, means.counts, new))
        compared = merging._compared(means.nearest, means.counts > 0, np.zeros((2, 1)))
    for metric in (None, root @ root.swapaxes(1, 2)):
        given = None if metric is None else lab.put(metric)
        costs = _merging.ward_costs(lab.device, means.each(lab.put), given, lab.put(value_scale))
        got, expected = lab.get(costs)[:, :n, :n], merging.ward_costs(means, metric, value_scale)
        np.testing.assert_array_equal(abs(got), expected)
        np.testing.assert_array_equal(np.signbit(got), ~compared & np.isfinite(expected))
        np.testing.assert_array_equal(got, got.swapaxes(1, 2))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_costs_are_as_good_as_in_float32(lab: Lab, offset: float) -> None:
    rng = np.random.default_rng(10)
    keys, values = rng.normal(size=(2, 2, 130, 64)) + offset
    counts, importance = rng.integers(0, 9, size=(2, 130)), rng.random((2, 130)) + 0.1
    wide = Means(keys, values - offset, counts, np.zeros((2, 130, 4)), importance)
    means = replace(wide.each(lambda x: x.astype(np.float32)), counts=counts.astype(np.int64))
    root = rng.normal(size=(2, 64, 64)) / 8
    metric = root @ root.swapaxes(1, 2)
    arrays = metric.astype(np.float32), np.float32([1.0, 2.0])
    costs = _merging.ward_costs(lab.device, means.each(lab.put), *map(lab.put, arrays))
    expected = merging.ward_costs(wide, metric, np.array([1.0, 2.0]))
    got = lab.get(costs)[:, :130, :130]
    np.testing.assert_allclose(got, expected, rtol=2e-5 if offset == 0 else 2e-4)
    np.testing.assert_array_equal(got, got.swapaxes(1, 2))


def test_no_cost_is_infinite_but_where_nothing_may_merge(lab: Lab) -> None:
    means = means_case(np.random.default_rng(5), 1, 20, 8, 8)
    means = replace(means, keys=means.keys * np.float32(1e18))
    costs = _merging.ward_costs(lab.device, means.each(lab.put), None, lab.put(np.ones(1, np.float32)))
    live = means.counts[0] > 0
    possible = live[:, None] & live[None, :] & ~np.eye(20, dtype=bool)
    np.testing.assert_array_equal(np.isfinite(lab.get(costs)[0, :20, :20]), possible)


@pytest.mark.parametrize("new", [None, 1.0, 0.6])
@pytest.mark.parametrize(
    ("n", "most", "places", "head_dim", "value_dim", "dtype"),
    [
        (40, 30, 30, 8, 8, "float16"),
        (200, 160, 160, 4, 4, None),
        (65, 20, 25, 64, 64, "bfloat16"),
        (65, 20, 50, 8, 8, None),
        (90, 10, 10, 80, 3, "float32"),
        (30, 40, 30, 8, 8, "float16"),
        (20, 1, 1, 3, 5, None),
        (1, 1, 1, 4, 4, "float16"),
    ],
)
def test_merging_ends_as_the_portable_merging(
    lab: Lab, n: int, most: int, places: int, head_dim: int, value_dim: int, dtype: str | None, new: float | None
) -> None:
    lab = lab.seeded(n)
    rng = np.random.default_rng(n)
    # Streams from which much, little and nothing has to go, by the shares of free places.
    means = means_case(rng, 3, n, head_dim, value_dim, (0.1,) if new is None else (0.0, 0.4, 0.8))
    if new is not None:
        means = replace(means, nearest=remembering(rng, means.counts, new))
    if dtype is not None:
        means = replace(means, leaders=rng.normal(size=means.keys.shape).astype(DTYPES[dtype]))
    value_scale = np.float32([1.0, 2.0, 0.5])
    got, moved = _merging.shrink(lab.device, means.each(lab.put), None, lab.put(value_scale), most, places)
    got = got.each(lab.get)
    # NumPy's take_along_axis does without an order of bfloat16: leaders follow as the numbers of their places.
    numbered = np.broadcast_to(np.arange(n)[None, :, None], (3, n, 1))
    expected, expected_moved = merging.merge_closest(replace(means, leaders=numbered), None, value_scale, most, places)
    live = expected.counts > 0
    np.testing.assert_array_equal(lab.get(moved), expected_moved)
    assert got.counts.dtype == np.int64
    np.testing.assert_array_equal(got.counts, expected.counts)
    for name in ("keys", "values", "spread", "importance"):
        np.testing.assert_allclose(getattr(got, name)[live], getattr(expected, name)[live], err_msg=name, **TOLERANCE)
    if new is None:
        assert got.nearest is None
    else:
        assert got.nearest.dtype == np.int32
        np.testing.assert_array_equal(got.nearest, expected.nearest)
    if dtype is None:
        assert got.leaders is None
    else:
        leaders = np.take_along_axis(means.leaders, expected.leaders, axis=1)
        assert got.leaders.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(got.leaders[live], leaders[live])


def test_as_many_members_more_change_counts_alone(lab: Lab) -> None:
    """All counts times 2^40: the same clusters merge, to the same numbers, and counts are exact."""
    rng = np.random.default_rng(7)
    means = means_case(rng, 3, 90, 8, 8, (0.0, 0.4, 0.8))
    means = replace(means, nearest=remembering(rng, means.counts, 0.5))
    scale = lab.put(np.float32([1.0, 2.0, 0.5]))
    results = []
    for counts in (means.counts, means.counts << 40):
        given = replace(means, counts=counts).each(lab.put)
        merged, moved = _merging.shrink(lab.device, given, None, scale, 20, 25)
        results.append((*(lab.get(x) for x in merged.arrays() if x is not None), lab.get(moved)))
    few, many = results
    assert many[2].dtype == np.int64
    np.testing.assert_array_equal(many[2], few[2] << 40)
    for mine, theirs in zip((*many[:2], *many[3:]), (*few[:2], *few[3:]), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_where_nothing_has_to_merge_the_clusters_only_close_up() -> None:
    lab = cuda_labs.emulation()
    rng = np.random.default_rng(3)
    means = means_case(rng, 2, 50, 8, 8)
    means = replace(means, nearest=remembering(rng, means.counts, 0.3))
    got, moved = _merging.shrink(lab.device, means, None, np.ones(2, np.float32), 50, 50)
    assert [launch.kernel for launch in lab.device.launches] == ["match_pairs", "merge_pairs"]  # type: ignore[attr-defined]
    for s in range(2):
        np.testing.assert_array_equal(got.keys[s][moved[s]], means.keys[s])
        nearest = means.nearest[s]
        np.testing.assert_array_equal(got.nearest[s][moved[s]], np.where(nearest < 0, -1, moved[s][nearest]))


def test_as_many_merge_as_must_whatever_is_remembered(lab: Lab) -> None:
    """All remember one, which merges once: all are compared, and the host knows the number of passes."""
    rng = np.random.default_rng(6)
    means = means_case(rng, 2, 90, 8, 8)
    means = replace(means, counts=np.ones_like(means.counts), nearest=np.full((2, 90), 7, np.int32))
    means.nearest[:, 7] = 30
    for most in (89, 50, 20):
        got, moved = _merging.shrink(lab.device, means.each(lab.put), None, lab.put(np.ones(2, np.float32)), most, most)
        counts = lab.get(got.counts)
        assert (counts > 0).all()
        for s in range(2):
            np.testing.assert_array_equal(np.bincount(lab.get(moved)[s], minlength=most), counts[s])
        nearest = lab.get(got.nearest)
        assert ((nearest < most) & (nearest != np.arange(most))).all()


@pytest.mark.parametrize("metric", ["none", "full"])
def test_merging_keeps_mass_means_and_second_moments(lab: Lab, metric: str) -> None:
    rng = np.random.default_rng(9)
    streams, n, head_dim = 2, 120, 16
    keys, values = rng.normal(size=(2, streams, n, head_dim)) + 5.0
    counts, importance = rng.integers(1, 9, size=(streams, n)), rng.random((streams, n)) + 0.1
    spread = rng.random((streams, n, 4))
    means = Means(*(np.asarray(x, dtype=np.float32) for x in (keys, values, counts, spread, importance)))
    means = replace(means, counts=means.counts.astype(np.int64))
    root = rng.normal(size=(streams, head_dim, head_dim)).astype(np.float32)
    given = None if metric == "none" else lab.put(root @ root.swapaxes(1, 2))
    scale = lab.put(np.ones(streams, dtype=np.float32))
    got, moved = _merging.shrink(lab.device, means.each(lab.put), given, scale, 50, 50)
    new = got.each(lab.get)
    members = np.zeros((streams, 50), dtype=np.int64)
    for s in range(streams):
        np.add.at(members[s], lab.get(moved)[s], counts[s])
    np.testing.assert_array_equal(new.counts, members)
    assert (new.counts > 0).sum(axis=1).tolist() == [50, 50]

    def moments(x: Means) -> list[np.ndarray]:
        w = x.counts[:, :, None].astype(np.float64)
        second = x.spread + merging.band_means(x.keys.astype(np.float64) ** 2)
        return [w.sum(axis=1), (w * x.keys).sum(axis=1), (w * x.values).sum(axis=1), (w * second).sum(axis=1)]

    for mine, before in zip(moments(new), moments(means), strict=True):
        np.testing.assert_allclose(mine, before, rtol=1e-5)
    np.testing.assert_allclose(new.importance.sum(axis=1), means.importance.sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_stream_is_matched_alike_by_one_block_and_by_many(seed: int) -> None:
    lab = cuda_labs.emulation()
    rng = np.random.default_rng(seed)
    keys, counts = rng.normal(size=(2, 530, 8)).astype(np.float32), np.ones((2, 530), np.int64)
    keys[0] = rng.integers(-2, 3, size=(530, 8))  # many costs are equal
    importance = rng.random((2, 530)).astype(np.float32)
    means = Means(keys, keys, counts, np.zeros((2, 530, 4), np.float32), importance, nearest=0 * counts - 1)
    results = []
    for clusters in (False, True):
        device: Any = replace(lab.seeded(seed).device, clusters=clusters)  # type: ignore[type-var]
        merged, moved = _merging.shrink(device, means, None, np.ones(2, np.float32), 300, 300)
        results.append([x for x in (*merged.arrays(), moved) if x is not None])
        blocks = [launch.blocks for launch in device.launches if launch.kernel == "match_pairs"]
        assert blocks == ([16] if clusters else [2])
    for one, many in zip(*results, strict=True):
        np.testing.assert_array_equal(one, many)


def test_there_is_room_for_many_clusters() -> None:
    assert _merging.MOST_CLUSTERS >= 1024 + 512
    assert math.isclose(_merging._match_shared(_merging.MOST_CLUSTERS, 1), 48 << 10, rel_tol=0.02)


# Absorbing


def stored_case(rng: np.random.Generator, clusters: int, n: int, dims: tuple[int, int], stored: str, means: str) -> Any:
    """Clusters and n exact tokens, as they are stored, at random."""

    def draw(dtype: str, *shape: int) -> np.ndarray:
        return rng.normal(size=(2, *shape)).astype(DTYPES[dtype])

    def draw_means(dim: int) -> Any:
        return coded(rng, clusters, dim, stored) if means == "int8" else draw(means, clusters, dim) + DTYPES[means](0.5)

    held = Means(
        keys=draw_means(dims[0]),
        values=draw_means(dims[1]),
        counts=rng.integers(0, 5, size=(2, clusters)).astype(np.int64),
        spread=abs(draw(stored, clusters, merging.bands(dims[0]))),
        importance=abs(draw(stored, clusters)),
        leaders=draw(stored, clusters, dims[0]),
        nearest=rng.integers(-1, max(clusters, 1), size=(2, clusters)).astype(np.int32),
    )
    return held, draw(stored, n, dims[0]), draw(stored, n, dims[1])


def wide(x: Any) -> Any:
    """NumPy does not know bfloat16 well enough for the portable code: to float32, which is exact."""
    if isinstance(x, Codes):
        return Codes(x.codes, wide(x.scales))
    return x if x is None or x.dtype.kind == "i" else x.astype(np.float32)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("stored", "means"), [
    ("float32", "float32"),
    ("float16", "float16"),
    ("float32", "int8"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
])  # fmt: skip
@pytest.mark.parametrize(
    ("clusters", "window", "leave", "dims"), [(70, 40, 20, (40, 24)), (0, 7, 3, (3, 5)), (9, 70, 35, (128, 128))]
)
def test_tokens_are_collected_as_by_the_portable_code(
    lab: Lab, clusters: int, window: int, leave: int, dims: tuple[int, int], stored: str, means: str, seed: int
) -> None:
    lab = lab.seeded(seed)
    held, keys, values = stored_case(np.random.default_rng(seed), clusters, window + 3, dims, stored, means)
    keys[1, 2], values[1] = 0, 0  # a key without a direction, a stream without values
    # Behind the sinks of a buffer, as a sketch has them.
    window_keys, window_values = (lab.put(x)[:, 3:] for x in (keys, values))
    put = functools.partial(put_codes, lab)
    pool, scale = _absorbing.collect(lab.device, held.each(put), window_keys, window_values, leave, 0.7)
    # Before they are widened here, 16 bits hold roots, and scales of codes in another unit.
    means_held = widened(held, np.float32).each(wide)
    expected, expected_scale = PORTABLE["collect"](means_held, wide(keys[:, 3:]), wide(values[:, 3:]), leave, 0.7)
    got = pool.each(lab.get)
    for name in ("keys", "values", "counts", "spread"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    assert got.leaders.dtype == DTYPES[stored]
    np.testing.assert_array_equal(got.leaders.astype(np.float32), expected.leaders)
    assert got.nearest.dtype == np.int32
    np.testing.assert_array_equal(got.nearest, expected.nearest)
    # The fourth power of a sum of a few hundred terms of order 1, in another order.
    np.testing.assert_allclose(got.importance, expected.importance, rtol=2e-4)
    np.testing.assert_allclose(lab.get(scale), expected_scale, rtol=1e-5)
    bare = replace(held, leaders=None, nearest=None).each(put)
    pool, _ = _absorbing.collect(lab.device, bare, window_keys, window_values, leave, 0.7)
    assert pool.leaders is None
    assert pool.nearest is None
    np.testing.assert_array_equal(lab.get(pool.keys), expected.keys)


@pytest.mark.parametrize("means", ["float16", "int8"])
def test_tokens_are_collected_behind_clusters_of_more_than_32_bits_count(lab: Lab, means: str) -> None:
    held, keys, values = stored_case(np.random.default_rng(3), 30, 20, (8, 8), "float16", means)
    held = replace(held, counts=held.counts * (2**40 + 1))
    put = functools.partial(put_codes, lab)
    pool, _ = _absorbing.collect(lab.device, held.each(put), lab.put(keys), lab.put(values), 10, 0.7)
    expected, _ = PORTABLE["collect"](widened(held, np.float32).each(wide), wide(keys), wide(values), 10, 0.7)
    np.testing.assert_array_equal(lab.get(pool.counts), expected.counts)
    # The fourth power of a sum, in another order.
    np.testing.assert_allclose(lab.get(pool.importance), expected.importance, rtol=2e-4)


@pytest.mark.parametrize(("window", "asked", "dim"), [(40, 40, 40), (7, 5, 3), (150, 150, 128), (70, 66, 4)])
def test_the_metric_is_the_portable_one(lab: Lab, window: int, asked: int, dim: int) -> None:
    rng = np.random.default_rng(window)
    codes = rng.integers(-127, 128, size=(2, window, dim)).astype(np.int8)
    # Powers of two and whole numbers: sums are exact, but for the ridge.
    scales = 2.0 ** rng.integers(-1, 2, size=(2, window)).astype(np.float32)
    keys = rng.normal(size=(2, asked, dim)).astype(np.float32)
    got = _absorbing.query_moment(lab.device, Codes(codes, scales).each(lab.put), asked)
    expected = PORTABLE["query_moment"](keys, Codes(codes, scales), (True,) * asked, None)
    np.testing.assert_allclose(lab.get(got), expected, rtol=1e-6, atol=1e-6 * abs(expected).max())
    np.testing.assert_array_equal(lab.get(got), lab.get(got).swapaxes(1, 2))
    for scale, dtype in [(None, "float32"), (0.3, "bfloat16")]:
        stored = keys.astype(DTYPES[dtype])
        expected = PORTABLE["query_moment"](wide(stored), Codes(codes, scales), (False,) * asked, scale)
        np.testing.assert_allclose(
            lab.get(_absorbing.key_moment(lab.device, lab.put(stored), scale)), expected, rtol=1e-5
        )


def between(x: np.ndarray, stored: str) -> np.ndarray:
    """Float32 numbers at any distance from those of 16 bits; none is just below a power of two.

    There the portable code takes its logarithm for the power, where a library rounds it so, and the kernel does not.
    """
    with np.errstate(over="ignore"):
        exact = x.astype(DTYPES[stored]).astype(np.float32)
    x = np.where((np.arange(x.size).reshape(x.shape) % 5 == 0) & np.isfinite(exact), exact, x)
    near = np.frexp(abs(x))[0] > 1 - 1e-5
    return np.where(near, 0.75, x).astype(np.float32)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("clusters", "sink", "window", "leave", "dims"), [
    (50, 4, 32, 16, (40, 24)),
    (1, 0, 7, 3, (3, 5)),
    (9, 2, 16, 0, (8, 8)),
])  # fmt: skip
def test_clusters_are_rounded_and_tokens_move_up_as_in_the_portable_code(
    lab: Lab, clusters: int, sink: int, window: int, leave: int, dims: tuple[int, int], stored: str, coded: bool
) -> None:
    rng = np.random.default_rng(clusters)
    means, keys, values = stored_case(rng, clusters, sink + window, dims, stored, "float32")
    size = 10.0 ** rng.integers(-9, 7, size=(2, clusters, 1))  # from below the smallest float16 to above the largest
    means = replace(means, keys=means.keys * size, values=means.values * size, leaders=None, nearest=None).each(wide)
    means = replace(means, keys=between(means.keys, stored), values=between(means.values, stored))
    queries = Codes(
        rng.integers(-127, 128, size=(2, window, dims[0])).astype(np.int8), rng.random((2, window), np.float32)
    )
    dithers = Dithers(*(dither(3, purpose, 77) for purpose in range(4)))
    exact = Exact(keys, values, queries, (True,) * window)
    given = exact.each(lab.put)
    got = _absorbing.settle(lab.device, means.each(lab.put), given, leave, dithers, coded)
    pytest.importorskip("torch")
    expected = settled_by_torch(means, exact, leave, dithers, coded, stored)
    for name in ("keys", "values", "spread", "importance"):
        mine = lab.get(getattr(got, name))
        assert mine.dtype == DTYPES[stored]
        np.testing.assert_array_equal(wide(mine), expected[name], err_msg=name)
    for name in ("key_codes", "value_codes", "queries"):
        mine = getattr(got, name)
        assert (mine is None) == (expected[name] is None)
        if mine is not None:
            np.testing.assert_array_equal(lab.get(mine.codes), expected[name][0], err_msg=name)
            np.testing.assert_array_equal(wide(lab.get(mine.scales)), expected[name][1], err_msg=name)


def settled_by_torch(
    means: Means, exact: Exact, leave: int, dithers: Dithers, coded: bool, stored: str
) -> dict[str, Any]:
    """The portable operation, on torch's tensors: NumPy has no limits of bfloat16."""
    import torch

    def put(x: Any) -> Any:
        tensor = torch.from_numpy(wide(x) if x.dtype == DTYPES["bfloat16"] else x)
        return tensor.to(torch.bfloat16) if x.dtype == DTYPES["bfloat16"] else tensor

    settled = PORTABLE["settle"](means.each(put), exact.each(put), leave, dithers, coded)

    def get(x: Any) -> Any:
        return (x.float() if x.is_floating_point() else x).numpy()

    codes = {name: getattr(settled, name) for name in ("key_codes", "value_codes", "queries")}
    return {name: get(getattr(settled, name)) for name in ("keys", "values", "spread", "importance")} | {
        name: None if x is None else (get(x.codes), get(x.scales)) for name, x in codes.items()
    }


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_block_is_absorbed_in_ten_launches(monkeypatch: pytest.MonkeyPatch, storage: Any) -> None:
    lab = cuda_labs.emulation()
    monkeypatch.setattr(_operations, "device_of", lambda x: lab.device)
    monkeypatch.setattr(backends, "_resolved", {"numpy": backends.Operations(**BACKEND.operations)})
    x = np.random.default_rng(15).normal(size=(2, 70, 8)).astype(np.float16)
    sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2, storage=storage)
    sketch.update(x[:, :66], x[:, :66], x[:, :66])
    before: Any = sketch.state
    lab.device.launches.clear()  # type: ignore[attr-defined]
    sketch.update(x[:, 66:67], x[:, 66:67], x[:, 66:67])
    after: Any = sketch.state
    assert before.n_exact == 18
    assert after.n_exact == 11
    names = [launch.kernel for launch in lab.device.launches]  # type: ignore[attr-defined]
    merging_names = ["weighted_mean", "make_points", "pair_costs", "match_pairs", "merge_pairs"]
    absorbed = ["gather", "turn_away", "weigh", "query_moment", *merging_names, "settle"]
    assert [name for name in names if name != "query_codes"] == absorbed
    assert len(absorbed) == 10


def test_new_clusters_alone_are_compared_with_all_but_every_eighth_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = cuda_labs.emulation()
    monkeypatch.setattr(subgen.means, "FEW_CLUSTERS", 4)
    monkeypatch.setattr(_operations, "device_of", lambda x: lab.device)
    monkeypatch.setattr(backends, "_resolved", {"numpy": backends.Operations(**BACKEND.operations)})
    new = []

    def matching(device: Any, costs: Any, counts: Any, importance: Any, remembered: Any, *rest: Any) -> Any:
        new.append((counts >= 0 if remembered is None else remembered < 0).sum(axis=1).tolist())
        return match(device, costs, counts, importance, remembered, *rest)

    match = _merging.match
    monkeypatch.setattr(_merging, "match", matching)
    x = np.random.default_rng(17).normal(size=(2, 18 + 8 * 17 + 1, 8)).astype(np.float32)
    sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2)
    for i in range(0, x.shape[1], 7):  # less than would be replayed
        sketch.update(*(x[:, i : i + 7],) * 3)
    # Four blocks of eight fill the clusters and more; of what merged then, each pair is one new cluster.
    assert len(new) == 18
    for turn, streams in enumerate(new):
        most = 24 + 8
        assert all(count == min(most, 8 * (turn + 1)) if turn < 4 or turn % 8 == 0 else 16 <= count < most
                   for count in streams)  # fmt: skip


# The sketch


GPUS = ("gpu", "torch_gpu")


@pytest.fixture(params=["emulation", "torch", *(pytest.param(gpu, marks=pytest.mark.gpu) for gpu in GPUS)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Where the library uses the kernels: on a GPU, and in the emulation for arrays of NumPy and torch."""
    labs = {
        "emulation": cuda_labs.emulation,
        "torch": cuda_labs.emulation_for_torch,
        "gpu": cuda_labs.gpu,
        "torch_gpu": cuda_labs.gpu_for_torch,
    }
    lab = labs[request.param]()
    if request.param == "gpu":
        yield lab
        return
    operations = BACKEND.operations if request.param == "emulation" else torch_backend().operations
    name = "numpy" if request.param == "emulation" else "torch"
    resolved = {**backends._resolved, name: backends.Operations(**operations)}
    monkeypatch.setattr(backends, "_resolved", resolved)
    if request.param not in GPUS:
        monkeypatch.setattr(_operations, "device_of", lambda x: lab.device)
        monkeypatch.setattr(_torch, "on_cuda", lambda x: True)
    if request.param == "emulation":  # NumPy's bfloat16 then stands for CuPy's
        monkeypatch.setattr(_array, "_is_cupys_bfloat16", lambda dtype, xp: dtype_name(dtype) == "bfloat16")
    _array.is_floating.cache_clear()
    yield lab
    _array.is_floating.cache_clear()


def run_sketch(lab: Lab, arrays: list[np.ndarray], asked: bool, **options: Any) -> tuple[np.ndarray, Any]:
    """Absorb most tokens at once and the last ones one by one; the last answers, and the state."""
    queries, keys, values = map(lab.put, arrays)
    sketch = subgen.AttentionSketch(sink=2, window=16, residual_samples=8, **options)
    n = keys.shape[-2] - 9
    sketch.update(keys[:, :n], values[:, :n], queries[:, :n] if asked else None)
    steps = [sketch.step(*(x[:, i : i + 1] for x in (queries, keys, values))) for i in range(n, n + 9)]
    return lab.get(steps[-1]), sketch.state


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"max_clusters": 24}),
        ("float16", {"max_clusters": 5}),
        ("float16", {"max_clusters": 24, "storage": "int8"}),
        ("float32", {"max_clusters": 24, "delta": 3.0}),
    ],
)
def test_the_sketch_answers_as_well_as_with_the_portable_code(
    library: Lab, dtype: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subgen.means, "FEW_CLUSTERS", 4)
    rng = np.random.default_rng(11)
    arrays = [rng.normal(size=(heads, 130, 8)).astype(dtype) for heads in (4, 2, 2)]
    exact = subgen.attention(*(x.astype(np.float32) for x in (arrays[0][:, -1:], *arrays[1:])))
    outputs, state = run_sketch(library, arrays, True, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_resolved", {"numpy": backends.Operations()})
        portable, portable_state = run_sketch(Lab("portable"), arrays, True, **options)
    # Merges may differ where costs are equal but for rounding; what they are worth may not.
    mine, portables = (np.linalg.norm(x.astype(np.float32) - exact) for x in (outputs, portable))
    assert mine < 1.1 * portables
    counts = library.get(state.counts)
    assert counts.dtype == np.int64
    assert counts.sum(axis=1).tolist() == [130 - state.n_exact] * 2
    assert (counts > 0).sum() == (portable_state.counts > 0).sum()
    if "delta" in options:
        assert state.nearest is None
        return
    # Those that stayed as they are remember another that lives, some time after all were compared anew.
    nearest = library.get(state.nearest)
    assert nearest.dtype == np.int32
    assert nearest.shape == counts.shape
    assert ((nearest >= 0).any(axis=1) == (portable_state.nearest >= 0).any(axis=1)).all()
    assert (nearest != np.arange(counts.shape[1])).all()
    assert (np.take_along_axis(counts, np.maximum(nearest, 0), axis=1)[nearest >= 0] > 0).all()


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_sketch_of_bfloat16(library: Lab, storage: Any) -> None:
    rng = np.random.default_rng(16)
    arrays = [rng.normal(size=(heads, 130, 8)).astype(DTYPES["bfloat16"]) for heads in (4, 2, 2)]
    errors = []
    for lab, given in ((library, arrays), (Lab("numpy"), [x.astype(np.float32) for x in arrays])):
        queries, keys, values = map(lab.put, given)
        sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2, storage=storage)
        sketch.update(keys[:, :120], values[:, :120], queries[:, :120])
        outputs = lab.get(sketch.step(*(x[:, 120:] for x in (queries, keys, values))))
        assert outputs.dtype == given[0].dtype
        state: Any = sketch.state
        assert {dtype_name(x.dtype) for x in (state.keys, state.spread)} == {dtype_name(given[0].dtype)}
        exact = subgen.attention(*(x.astype(np.float32) for x in arrays), causal=True)[:, 120:]
        errors.append(np.linalg.norm(outputs.astype(np.float32) - exact) / np.linalg.norm(exact))
    assert errors[0] < 1.1 * errors[1]


def test_threshold_clusters_and_samples_are_those_of_the_portable_code(library: Lab) -> None:
    rng = np.random.default_rng(12)
    arrays = [rng.integers(-2, 3, size=(heads, 130, 4)).astype(np.float32) for heads in (2, 2, 2)]
    outputs, state = run_sketch(library, arrays, False, delta=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_resolved", {"numpy": backends.Operations()})
        portable, expected = run_sketch(Lab("portable"), arrays, False, delta=2.0)
    np.testing.assert_allclose(outputs, portable, **TOLERANCE)
    for mine, portables in [
        (state.counts, expected.counts),
        (state.leaders, expected.leaders),
        (state.residual.cluster, expected.residual.cluster),
        (state.residual.keys, expected.residual.keys),
    ]:
        np.testing.assert_array_equal(library.get(mine), portables)


@pytest.mark.parametrize(("heads", "storage"), [(2, "input"), (8, "input"), (8, "int8")])
def test_a_token_is_three_launches(library: Lab, heads: int, storage: Any) -> None:
    if library.name in GPUS:
        pytest.skip("launches are counted in the emulation")
    rng = np.random.default_rng(18)
    queries, keys, values = (library.put(rng.normal(size=(2, h, 60, 8)).astype(np.float16)) for h in (heads, 2, 2))
    sketch = subgen.AttentionSketch(max_clusters=8, window=16, sink=2, storage=storage)
    sketch.update(keys[:, :, :48], values[:, :, :48], queries[:, :, :48])
    token = [library.device.packed(x[:, :, 48:49]) for x in (queries, keys, values)]
    launches = library.device.launches  # type: ignore[attr-defined]
    launches.clear()
    outputs = sketch.step(*token)
    assert [launch.kernel for launch in launches] == ["take_in", "attend_split", "attend_join"]
    assert outputs.dtype == queries.dtype
    assert tuple(outputs.shape) == (2, heads, 1, 8)
    given = {library.device.pointer(x) for x in token}
    assert given <= {int(x) for launch in launches for x in launch.arguments if isinstance(x, np.uint64)}


# One by one; recorded, and replayed with one over; without queries; and where all are compared anew in between.
@pytest.mark.parametrize("storage", ["input", "int8"])
@pytest.mark.parametrize(("turns", "asked", "few"), [(7, True, 768), (8, True, 768), (9, False, 4), (20, True, 4)])
def test_a_long_block_is_what_its_turns_are(
    library: Lab, turns: int, asked: bool, few: int, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, whether they are launched one by one or replayed."""
    monkeypatch.setattr(subgen.means, "FEW_CLUSTERS", few)
    rng = np.random.default_rng(19)
    n = 18 + 5 * 8 + turns * 8 + 3
    # Of a longer prompt, so that streams lie apart.
    arrays = [library.put(rng.normal(size=(1, h, n + 10, 8)).astype(np.float16))[:, :, :n] for h in (4, 2, 2)]
    states = []
    for size in (n, 8):
        sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2, seed=3, storage=storage)
        for i in range(0, n, size):
            q, k, v = (x[:, :, i : i + size] for x in arrays)
            sketch.update(k, v, q if asked else None)
        states.append(sketch.state)
    whole: Any
    whole, *others = states
    assert whole.n_seen == n
    used = whole.n_means + whole.n_exact
    for other in others:
        assert (whole.n_exact, whole.asked) == (other.n_exact, other.asked)
        for name in ("keys", "values", "counts", "spread", "importance", "nearest"):
            mine, theirs = getattr(whole, name), getattr(other, name)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                end = used if name in ("keys", "values") else None
                np.testing.assert_array_equal(library.get(mine)[:, :end], library.get(theirs)[:, :end])
        for name in ("key_codes", "value_codes"):
            mine, theirs = getattr(whole, name), getattr(other, name)
            assert (mine is None) == (storage == "input")
            if mine is not None:
                np.testing.assert_array_equal(library.get(mine.codes), library.get(theirs.codes))
                np.testing.assert_array_equal(library.get(mine.scales), library.get(theirs.scales))
        for name in ("codes", "scales"):
            pair = (library.get(getattr(s.queries, name))[:, : len(s.asked)] for s in (whole, other))
            if asked:
                np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_long_block_counts_in_64_bits(library: Lab, storage: Any) -> None:
    """Eight turns, which are replayed where they can be, and a token: as many tokens more, to the last."""
    rng = np.random.default_rng(21)
    queries, keys, values = (library.put(rng.normal(size=(2, 122, 8)).astype(np.float32)) for _ in range(3))
    sketch = subgen.AttentionSketch(max_clusters=10, window=16, sink=2, storage=storage)
    sketch.update(keys[:, :50], values[:, :50], queries[:, :50])
    state: Any = sketch.state
    counts = library.get(state.counts) << 40
    long = replace(state, counts=library.put(counts), n_seen=int(counts[0].sum()) + state.n_exact)
    sketch = sketch.continued(sketch.layout, long)
    sketch.update(keys[:, 50:121], values[:, 50:121], queries[:, 50:121])
    assert np.isfinite(library.get(sketch.step(*(x[:, 121:] for x in (queries, keys, values))))).all()
    state = sketch.state
    assert state.n_seen == long.n_seen + 72
    found = library.get(state.counts)
    assert found.dtype == np.int64
    assert found.sum(axis=1).tolist() == [state.n_seen - state.n_exact] * 2
    # The heavy clusters are there, with few tokens more.
    assert (found >> 40).sum(axis=1).tolist() == (counts >> 40).sum(axis=1).tolist()


def test_a_long_block_leaves_what_it_was_given(library: Lab) -> None:
    """The turns write into arrays of their own; what comes after is the same, too."""
    rng = np.random.default_rng(20)
    arrays = [rng.normal(size=(2, 400, 8)).astype(np.float32) for _ in range(3)]
    queries, keys, values = map(library.put, arrays)
    sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2)
    sketch.update(keys[:, :200], values[:, :200], queries[:, :200])
    state: Any = sketch.state
    used = 24 + state.n_exact  # what is behind is room, which may be written
    before = [np.array(library.get(x))[:, :used] for x in (state.keys, state.values, state.counts, state.spread)]
    again = sketch.continued(sketch.layout, state)
    for each in (sketch, again):
        each.update(keys[:, 200:], values[:, 200:], queries[:, 200:])
    now = [library.get(x)[:, :used] for x in (state.keys, state.values, state.counts, state.spread)]
    for x, y in zip(now, before, strict=True):
        np.testing.assert_array_equal(x, y)
    for mine, given in zip((queries, keys, values), arrays, strict=True):
        np.testing.assert_array_equal(library.get(mine), given)
    mine, theirs = (library.get(each.attend(queries[:, -1:])) for each in (sketch, again))
    np.testing.assert_array_equal(mine, theirs)


def test_a_token_in_decoding_copies_no_window(library: Lab) -> None:
    rng = np.random.default_rng(13)
    sketch = subgen.AttentionSketch(max_clusters=8, window=16, sink=2)
    x = library.put(rng.normal(size=(2, 60, 8)).astype(np.float32))
    sketch.update(x[:, :48], x[:, :48])
    before: Any = sketch.state
    sketch.step(x[:, 48:49], x[:, 48:49], x[:, 48:49])
    after: Any = sketch.state
    assert after.n_seen == before.n_seen + 1
    assert after.keys is before.keys


# Mistakes


def test_every_barrier_is_needed_and_every_mistake_noticed() -> None:
    cuda_labs.emulation()
    program = [sys.executable, "-m", "cuda_emulation.mutants"]
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    files = ("absorbing", "attention", "decoding", "leaders", "matching", "merging")
    assert sorted(report) == sorted([*(f"{file}.cu" for file in files), "matching.cu by 2"])
    assert [(file, what) for file, mistakes in report.items() for what, seen in mistakes.items() if not seen] == []


def test_nothing_is_read_or_written_out_of_bounds() -> None:
    asan = cuda_emulation.sanitizer()
    if asan is None:
        pytest.skip("the address sanitizer is not installed")
    environment = {**os.environ, **cuda_emulation.sanitizing(asan)}
    done = subprocess.run(
        [sys.executable, "-m", "cuda_emulation.sanitized"], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "done\n", done.stderr
