"""The CUDA kernels against the portable operations: executed on the CPU by emulation, and on a GPU if there is one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_emulation
import cuda_labs
import numpy as np
import pytest
from cuda_labs import DTYPES, Lab
from subgen_cupy import BACKEND, _attention, _leaders, _merging, _operations, _rounding, _threefry

import subgen
from subgen import backends, merging
from subgen.backends import PORTABLE
from subgen.mass import log_weights
from subgen.merging import Means

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
    counts = rng.integers(0, 6, size=(streams, c)).astype(np.int32)
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
    clusters = lab.put(np.ones((1, 3), np.int32)), lab.put(np.zeros((1, 3, 4), np.float32))
    got = _attention.attend(lab.device, *map(lab.put, (queries, keys, values)), clusters)
    expected = written_out(queries, keys, values, np.zeros((1, rows, n + 3)))
    np.testing.assert_allclose(lab.get(got[0]), expected[0], **TOLERANCE)
    np.testing.assert_allclose(lab.get(got[1]), expected[1], **TOLERANCE)


def test_a_decoding_step_is_two_launches_and_copies_nothing() -> None:
    lab = cuda_labs.emulation()
    rng = np.random.default_rng(7)
    queries, pairs = attention_case(rng, "bfloat16", 64, 64, 2, 4)
    keys, values = pairs(25)
    clusters = np.ones((2, 9), dtype=np.int32), np.zeros((2, 9, 4), dtype=DTYPES["bfloat16"])
    _attention.attend(lab.device, queries, keys[:, :18], values[:, :18], clusters)
    split, join = lab.device.launches  # type: ignore[attr-defined]
    assert (split.kernel, join.kernel) == ("attend_split", "attend_join")
    given = {x.ctypes.data for x in (queries, keys, values, *clusters)}
    assert given <= {int(x) for x in split.arguments if isinstance(x, np.uint64)}


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


def test_vectors_in_8_bits_are_the_portable_ones(lab: Lab) -> None:
    rng = np.random.default_rng(14)
    x = rng.normal(size=(3, 11, 70)).astype(np.float32) * 10.0 ** rng.integers(-6, 6, size=(3, 11, 1))
    x = x.astype(np.float32)
    x[0, 3], x[1, 2, ::2] = 0.0, np.float32(2.5)
    # One head of a group: its vectors lie apart.
    for part in (slice(0, 11), slice(4, 5), slice(0, 7)):
        got = _rounding.quantize(lab.device, lab.put(x)[:, part])
        expected = PORTABLE["quantize"](x[:, part], np.dtype("float32"))
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


def means_case(rng: np.random.Generator, streams: int, n: int, head_dim: int, value_dim: int) -> Means:
    """Clusters whose costs are exact in float32: small integers about a mean of zero, weights powers of two."""
    half = n // 2
    keys = rng.integers(-3, 4, size=(streams, half, head_dim))
    keys = np.concatenate([keys, -keys, np.zeros((streams, n - 2 * half, head_dim))], axis=1)
    counts = 2.0 ** rng.integers(0, 3, size=(streams, half))
    counts = np.concatenate([counts, counts, np.ones((streams, n - 2 * half))], axis=1)
    dead = rng.random((streams, half)) < 0.1
    counts = np.where(np.concatenate([dead, dead, np.zeros((streams, n - 2 * half), bool)], axis=1), 0.0, counts)
    values = rng.integers(-3, 4, size=(streams, n, value_dim))
    spread = rng.integers(0, 4, size=(streams, n, merging.bands(head_dim)))
    importance = 2.0 ** rng.integers(-1, 2, size=(streams, n))
    order = rng.permutation(n)
    arrays = keys, values, counts, spread, importance
    means = Means(*(np.ascontiguousarray(x[:, order]).astype(np.float32) for x in arrays))
    return replace(means, counts=means.counts.astype(np.int32))


def rounds_of_mutual_neighbours(costs: np.ndarray, surplus: int) -> dict[int, int]:
    """Second of each pair by its first: the matching of one stream, written out."""
    pairs: dict[int, int] = {}
    free = [True] * len(costs)
    while surplus > 0:
        masked = np.where(np.array(free)[None, :], costs, np.inf)
        nearest = [int(np.argmin(row)) for row in masked]
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
    return pairs


def packed_nearest(costs: np.ndarray) -> np.ndarray:
    """The first of the least costs of each cluster: its bits, then its index."""
    bits = costs.min(axis=2).view(np.int32).astype(np.int64)
    return bits << 32 | np.argmin(costs, axis=2)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "most"), [(1, 1), (2, 1), (37, 30), (64, 20), (100, 60), (150, 149), (33, 40), (40, 1)])
def test_pairs_are_matched_as_written_out_with_many_ties(lab: Lab, n: int, most: int, seed: int) -> None:
    lab = lab.seeded(seed)
    rng = np.random.default_rng(seed)
    streams = 2
    costs = rng.integers(0, 4 if seed % 2 else 1000, size=(streams, n, n)).astype(np.float32)
    costs = np.minimum(costs, costs.swapaxes(1, 2))
    counts = (rng.random((streams, n)) < 0.9).astype(np.int32)
    possible = (counts[:, :, None] > 0) & (counts[:, None, :] > 0) & ~np.eye(n, dtype=bool)
    costs[~possible] = np.inf
    places = min(n, most + 3)
    moved = lab.put(np.full((streams, n), -1))
    given = lab.put(costs), lab.put(packed_nearest(costs))
    matched = _merging.match(lab.device, given, lab.put(counts), most, places, moved, True)
    source, other, moved = map(lab.get, (*matched, moved))
    for s in range(streams):
        live = [i for i in range(n) if counts[s, i] > 0]
        pairs = rounds_of_mutual_neighbours(costs[s], len(live) - most)
        gone = set(pairs.values())
        kept = [i for i in live if i not in gone]
        expected = [(i, pairs.get(i, -1)) for i in kept] + [(i, -2) for i in range(n) if i not in kept]
        assert list(zip(source[s].tolist(), other[s].tolist(), strict=True)) == expected[:places]
        place = {i: p for p, (i, _) in enumerate(expected)}
        place |= {j: place[i] for i, j in pairs.items()}
        assert moved[s].tolist() == [place[i] for i in range(n)]


@pytest.mark.parametrize(("n", "head_dim", "value_dim"), [(1, 8, 8), (31, 8, 3), (70, 64, 64)])
def test_costs_equal_the_portable_ones_to_the_last_bit(lab: Lab, n: int, head_dim: int, value_dim: int) -> None:
    rng = np.random.default_rng(8)
    means = means_case(rng, 2, n, head_dim, value_dim)
    value_scale = np.float32([0.5, 2.0])
    root = rng.integers(-1, 2, size=(2, head_dim, head_dim)).astype(np.float32)
    for metric in (None, root @ root.swapaxes(1, 2)):
        given = None if metric is None else lab.put(metric)
        costs, nearest = _merging.ward_costs(lab.device, means.each(lab.put), given, lab.put(value_scale))
        got = lab.get(costs)
        np.testing.assert_array_equal(got, merging.ward_costs(means, metric, value_scale))
        np.testing.assert_array_equal(got, got.swapaxes(1, 2))
        np.testing.assert_array_equal(lab.get(nearest), packed_nearest(got))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_costs_are_as_good_as_in_float32(lab: Lab, offset: float) -> None:
    rng = np.random.default_rng(10)
    keys, values = rng.normal(size=(2, 2, 130, 64)) + offset
    counts, importance = rng.integers(0, 9, size=(2, 130)), rng.random((2, 130)) + 0.1
    wide = Means(keys, values - offset, counts, np.zeros((2, 130, 4)), importance)
    means = replace(wide.each(lambda x: x.astype(np.float32)), counts=counts.astype(np.int32))
    root = rng.normal(size=(2, 64, 64)) / 8
    metric = root @ root.swapaxes(1, 2)
    arrays = metric.astype(np.float32), np.float32([1.0, 2.0])
    costs, nearest = _merging.ward_costs(lab.device, means.each(lab.put), *map(lab.put, arrays))
    expected = merging.ward_costs(wide, metric, np.array([1.0, 2.0]))
    got = lab.get(costs)
    np.testing.assert_allclose(got, expected, rtol=2e-5 if offset == 0 else 2e-4)
    np.testing.assert_array_equal(got, got.swapaxes(1, 2))
    np.testing.assert_array_equal(lab.get(nearest), packed_nearest(got))


def test_no_cost_is_infinite_but_where_nothing_may_merge(lab: Lab) -> None:
    means = means_case(np.random.default_rng(5), 1, 20, 8, 8)
    means = replace(means, keys=means.keys * np.float32(1e18))
    costs, _ = _merging.ward_costs(lab.device, means.each(lab.put), None, lab.put(np.ones(1, np.float32)))
    live = means.counts[0] > 0
    possible = live[:, None] & live[None, :] & ~np.eye(20, dtype=bool)
    np.testing.assert_array_equal(np.isfinite(lab.get(costs)[0]), possible)


@pytest.mark.parametrize(
    ("n", "most", "places", "head_dim", "value_dim", "dtype"),
    [
        (40, 30, 30, 8, 8, "float16"),
        (65, 20, 25, 64, 64, "bfloat16"),
        (65, 20, 50, 8, 8, None),
        (90, 10, 10, 80, 3, "float32"),
        (30, 40, 30, 8, 8, "float16"),
        (20, 1, 1, 3, 5, None),
        (1, 1, 1, 4, 4, "float16"),
    ],
)
def test_merging_ends_as_the_portable_merging(
    lab: Lab, n: int, most: int, places: int, head_dim: int, value_dim: int, dtype: str | None
) -> None:
    lab = lab.seeded(n)
    rng = np.random.default_rng(n)
    means = means_case(rng, 3, n, head_dim, value_dim)
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
    assert got.counts.dtype == np.int32
    np.testing.assert_array_equal(got.counts, expected.counts)
    for name in ("keys", "values", "spread", "importance"):
        np.testing.assert_allclose(getattr(got, name)[live], getattr(expected, name)[live], err_msg=name, **TOLERANCE)
    if dtype is None:
        assert got.leaders is None
    else:
        leaders = np.take_along_axis(means.leaders, expected.leaders, axis=1)
        assert got.leaders.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(got.leaders[live], leaders[live])


def test_where_nothing_has_to_merge_the_clusters_only_close_up() -> None:
    lab = cuda_labs.emulation()
    means = means_case(np.random.default_rng(3), 2, 50, 8, 8)
    got, moved = _merging.shrink(lab.device, means, None, np.ones(2, np.float32), 50, 50)
    assert [launch.kernel for launch in lab.device.launches] == ["match_pairs", "merge_pairs"]  # type: ignore[attr-defined]
    for s in range(2):
        np.testing.assert_array_equal(got.keys[s][moved[s]], means.keys[s])


@pytest.mark.parametrize("metric", ["none", "full"])
def test_merging_keeps_mass_means_and_second_moments(lab: Lab, metric: str) -> None:
    rng = np.random.default_rng(9)
    streams, n, head_dim = 2, 120, 16
    keys, values = rng.normal(size=(2, streams, n, head_dim)) + 5.0
    counts, importance = rng.integers(1, 9, size=(streams, n)), rng.random((streams, n)) + 0.1
    spread = rng.random((streams, n, 4))
    means = Means(*(np.asarray(x, dtype=np.float32) for x in (keys, values, counts, spread, importance)))
    means = replace(means, counts=means.counts.astype(np.int32))
    root = rng.normal(size=(streams, head_dim, head_dim)).astype(np.float32)
    given = None if metric == "none" else lab.put(root @ root.swapaxes(1, 2))
    scale = lab.put(np.ones(streams, dtype=np.float32))
    got, moved = _merging.shrink(lab.device, means.each(lab.put), given, scale, 50, 50)
    new = got.each(lab.get)
    members = np.zeros((streams, 50), dtype=np.int32)
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


def test_there_is_room_for_many_clusters() -> None:
    assert _merging.MOST_CLUSTERS >= 1024 + 512
    assert math.isclose(_merging._match_shared(_merging.MOST_CLUSTERS), 48 << 10, rel_tol=0.02)


# The sketch


@pytest.fixture
def library(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Where the library uses the CuPy backend: for CuPy arrays, and for NumPy's in the emulation."""
    if lab.name == "emulation":
        monkeypatch.setattr(_operations, "device_of", lambda x: lab.device)
        monkeypatch.setattr(backends, "_resolved", {"numpy": backends.Operations(**BACKEND.operations)})
    return lab


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
def test_the_sketch_answers_as_well_as_with_the_portable_code(library: Lab, dtype: str, options: Any) -> None:
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
    assert counts.dtype == np.int32
    assert counts.sum(axis=1).tolist() == [130 - state.n_exact] * 2
    assert (counts > 0).sum() == (portable_state.counts > 0).sum()


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


# Barriers


def test_every_barrier_is_needed_and_its_absence_noticed() -> None:
    cuda_labs.emulation()
    program = [sys.executable, "-m", "cuda_emulation.mutants"]
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert sorted(report) == ["attention.cu", "leaders.cu", "merging.cu"]
    assert [(file, line) for file, lines in report.items() for line, noticed in lines.items() if not noticed] == []


def test_nothing_is_read_or_written_out_of_bounds() -> None:
    asan = cuda_emulation.sanitizer()
    if asan is None:
        pytest.skip("the address sanitizer is not installed")
    environment = {**os.environ, **cuda_emulation.sanitizing(asan)}
    done = subprocess.run(
        [sys.executable, "-m", "cuda_emulation.sanitized"], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "done\n", done.stderr
