"""The kernels of absorb.cu: gather, the metric of the queries, store; and the launches of an absorption."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cuda_targets
import numpy as np
import pytest
from cuda_cases import absorb_options, random_quantized, random_vectors, upcast
from cuda_targets import DTYPES, Target, using_kernels
from subgen_cupy import absorb, merging

import subgen
from subgen._tree import leaves, tree_map
from subgen.default import absorb as portable
from subgen.default import algorithm
from subgen.default.merging import bands
from subgen.default.metric import query_second_moment
from subgen.default.state import BufferOwner, Clusters, Exact, Quantized


def stored_case(
    rng: np.random.Generator, n_clusters: int, n: int, dims: tuple[int, int], stored: str, means: str
) -> tuple[Clusters, np.ndarray, np.ndarray]:
    """Draw clusters, as they are stored, and keys and values of n exact tokens."""

    def draw(dtype: str, *shape: int) -> np.ndarray:
        return random_vectors(rng, dtype, 2, *shape)

    def draw_means(dim: int) -> Any:
        if means == "int8":
            return random_quantized(rng, n_clusters, dim, stored)
        return draw(means, n_clusters, dim) + DTYPES[means](0.5)

    clusters = Clusters(
        keys=draw_means(dims[0]),
        values=draw_means(dims[1]),
        counts=rng.integers(0, 5, size=(2, n_clusters)),
        key_variance=abs(draw(stored, n_clusters, bands(dims[0]))),
        importance=abs(draw(stored, n_clusters)),
        leaders=draw(stored, n_clusters, dims[0]),
        nearest=rng.integers(-1, max(n_clusters, 1), size=(2, n_clusters)).astype(np.int32),
    )
    return clusters, draw(stored, n, dims[0]), draw(stored, n, dims[1])


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("stored", "means"), [
    ("float32", "float32"),
    ("float16", "float16"),
    ("float32", "int8"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
])  # fmt: skip
@pytest.mark.parametrize(
    ("n_clusters", "window", "n_evicted", "dims"), [(70, 40, 20, (40, 24)), (0, 7, 3, (3, 5)), (9, 70, 35, (128, 128))]
)
def test_tokens_are_gathered_as_by_the_portable_code(
    target: Target,
    n_clusters: int,
    window: int,
    n_evicted: int,
    dims: tuple[int, int],
    stored: str,
    means: str,
    seed: int,
) -> None:
    target = target.seeded(seed)
    clusters, keys, values = stored_case(np.random.default_rng(seed), n_clusters, window + 3, dims, stored, means)
    keys[1, 2], values[1] = 0, 0  # a key without a direction, a stream without values
    # Behind the sinks of a buffer, as a sketch has them.
    window_keys, window_values = (target.put(x)[:, 3:] for x in (keys, values))
    given = target.put(clusters)
    # 16 bits hold roots, and scales in another unit.
    wide = upcast(portable.upcast_clusters(clusters, np.float32))
    for refresh in (False, True):
        options = absorb_options(n_evicted, weight=0.7, refresh=refresh)
        got, unit = target.get(absorb.gather(target.device, given, window_keys, window_values, options))
        expected, expected_unit = portable.gather(wide, upcast(keys[:, 3:]), upcast(values[:, 3:]), options)
        for name in ("keys", "values", "counts", "key_variance"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
        assert got.counts.dtype == np.int64
        assert got.leaders.dtype == DTYPES[stored]
        np.testing.assert_array_equal(got.leaders.astype(np.float32), expected.leaders)
        assert got.nearest.dtype == np.int32
        np.testing.assert_array_equal(got.nearest, expected.nearest)
        assert (got.nearest < 0).all() or not refresh
        # The fourth power of a sum of a few hundred terms of order 1, in another order.
        np.testing.assert_allclose(got.importance, expected.importance, rtol=2e-4)
        np.testing.assert_allclose(unit, expected_unit, rtol=1e-5)
    bare = replace(given, leaders=None, nearest=None)
    got, _ = target.get(absorb.gather(target.device, bare, window_keys, window_values, options))
    assert got.leaders is None
    assert got.nearest is None
    np.testing.assert_array_equal(got.keys, expected.keys)


@pytest.mark.parametrize("means", ["float16", "int8"])
def test_counts_beyond_32_bits_are_gathered(target: Target, means: str) -> None:
    rng = np.random.default_rng(4)
    clusters, keys, values = stored_case(rng, 40, 8, (8, 8), "float16", means)
    clusters = replace(clusters, counts=clusters.counts * (1 << 40) + rng.integers(0, 2, size=(2, 40)))
    options = absorb_options(4)
    got, _ = target.get(absorb.gather(target.device, *map(target.put, (clusters, keys, values)), options))
    expected, _ = portable.gather(clusters, keys, values, options)
    np.testing.assert_array_equal(got.counts, expected.counts)
    np.testing.assert_allclose(got.importance, expected.importance, rtol=2e-4)


def moment_case(window: int, dim: int, stored: str, has_query: np.ndarray) -> Exact:
    """Draw exact tokens of two streams behind 3 sinks, some with a query.

    Powers of two and whole numbers: sums over queries are exact, but for the ridge.
    """
    rng = np.random.default_rng(window)
    n = window + 3
    codes = rng.integers(-127, 128, size=(2, n, dim)).astype(np.int8)
    scales = 2.0 ** rng.integers(-1, 2, size=(2, n)).astype(np.float32)
    # Sinks have queries, which do not count.
    has_query = np.concatenate([np.ones((2, 3), bool), has_query], axis=1)
    queries = Quantized(codes * has_query[:, :, None].astype(np.int8), scales * has_query)
    keys = random_vectors(rng, stored, 2, n, dim)
    return Exact(keys, keys, queries, n, BufferOwner(n))


def assert_moments_equal(target: Target, exact: Exact, scale: float | None, rtol: float) -> np.ndarray:
    """Compare the metric with the portable one, and return it."""
    got = target.get(absorb.query_moment(target.device, target.put(exact), 3, scale))
    window = tree_map(lambda x: x[:, 3:], exact)
    expected = query_second_moment(upcast(window.keys), window.queries, scale)
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * abs(expected).max())
    np.testing.assert_array_equal(got, got.swapaxes(1, 2))
    return got


@pytest.mark.parametrize(("window", "n_queries", "dim"), [(40, 40, 40), (7, 5, 3), (150, 150, 128), (70, 66, 4)])
def test_the_metric_equals_the_portable_one(target: Target, window: int, n_queries: int, dim: int) -> None:
    has_query = np.tile(np.arange(window) < n_queries, (2, 1))
    assert_moments_equal(target, moment_case(window, dim, "float32", has_query), None, 1e-6)
    # In a stream without queries it is isotropic, from the keys of the window.
    for scale, stored in [(None, "float32"), (0.3, "bfloat16")]:
        got = assert_moments_equal(target, moment_case(window, dim, stored, has_query & False), scale, 1e-5)
        np.testing.assert_array_equal(got, got * np.eye(dim))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("window", "dim"), [(40, 40), (9, 3), (150, 128)])
def test_the_kernel_counts_the_queries_of_each_stream(
    target: Target, window: int, dim: int, scale: float | None, stored: str
) -> None:
    """Of one stream some tokens have a query, of the other none: only that one has the isotropic metric."""
    rng = np.random.default_rng(dim)
    has_query = np.stack([rng.random(window) < 0.4, np.zeros(window, bool)])
    has_query[0, 1:3] = True, False
    for rows in (has_query, has_query[::-1]):
        # The diagonal of the isotropic metric is a mean over keys, in another order.
        got = assert_moments_equal(target, moment_case(window, dim, stored, rows), scale, 1e-5)
        isotropic = [bool((x == np.diag(np.full(dim, x[0, 0]))).all()) for x in got]
        assert isotropic == (~rows.any(axis=1)).tolist()


def test_a_stream_without_queries_and_with_zero_keys_has_a_metric(target: Target) -> None:
    exact = moment_case(7, 3, "float32", np.zeros((2, 7), bool))
    exact.keys[:] = 0.0
    got = assert_moments_equal(target, exact, 0.5, 0.0)
    np.testing.assert_array_equal(got, np.broadcast_to(0.25 * np.eye(3), (2, 3, 3)))


def between(x: np.ndarray, stored: str) -> np.ndarray:
    """Move float32 numbers to any distance from those of 16 bits; none is just below a power of two.

    There the portable code takes its logarithm for the power, where a library rounds it so, and the kernel does not.
    """
    with np.errstate(over="ignore"):
        exact = x.astype(DTYPES[stored]).astype(np.float32)
    x = np.where((np.arange(x.size).reshape(x.shape) % 5 == 0) & np.isfinite(exact), exact, x)
    near = np.frexp(abs(x))[0] > 1 - 1e-5
    return np.where(near, 0.75, x).astype(np.float32)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("n_clusters", "sink", "window", "n_evicted", "dims"), [
    (50, 4, 32, 16, (40, 24)),
    (1, 0, 7, 3, (3, 5)),
    (9, 2, 16, 0, (8, 8)),
])  # fmt: skip
def test_clusters_are_rounded_and_tokens_evicted_as_by_the_portable_code(
    target: Target,
    n_clusters: int,
    sink: int,
    window: int,
    n_evicted: int,
    dims: tuple[int, int],
    stored: str,
    quantized: bool,
) -> None:
    rng = np.random.default_rng(n_clusters)
    n = sink + window
    clusters, keys, values = stored_case(rng, n_clusters, n, dims, stored, "float32")
    size = 10.0 ** rng.integers(-9, 7, size=(2, n_clusters, 1))  # from below the smallest float16 to above the largest
    clusters = upcast(replace(clusters, keys=clusters.keys * size, values=clusters.values * size, leaders=None))
    clusters = replace(clusters, keys=between(clusters.keys, stored), values=between(clusters.values, stored))
    clusters = replace(clusters, counts=clusters.counts * ((1 << 33) + 1))
    if n_clusters == 9:
        clusters = replace(clusters, nearest=None)
    codes = rng.integers(-127, 128, size=(2, n, dims[0])).astype(np.int8)
    exact = Exact(keys, values, Quantized(codes, rng.random((2, n), np.float32)), n, BufferOwner(n))
    options = absorb_options(n_evicted, sink)
    # Of more places, as in threshold mode, where clusters are part of a longer array.
    padded = tree_map(lambda x: np.concatenate([x, x[:, :2]], axis=1), clusters)
    given, tokens = target.put(padded).part(slice(n_clusters)), target.put(exact)
    new = absorb.new_arrays(target.device, given, tokens, quantized)
    absorb.store(target.device, new, given, tokens, options)
    # By NumPy, whose roots round to nearest; those of torch on a CPU may be the number beside it.
    with np.errstate(over="ignore"):  # scales of the largest vectors are infinite in float16
        rounded = portable.store(clusters, np.dtype(DTYPES[stored]), options.dithers, quantized)
    evicted = portable.evict(exact, options.sink, options.n_evicted)
    for mine, theirs in zip(target.get(new), (rounded, evicted), strict=True):
        got, wanted = dict(leaves(mine)), dict(leaves(theirs))
        assert got.keys() == wanted.keys()
        for name, x in wanted.items():
            assert got[name].dtype == x.dtype, name
            np.testing.assert_array_equal(upcast(got[name]), upcast(x), err_msg=name)


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_block_is_absorbed_in_ten_launches(storage: Any) -> None:
    target = cuda_targets.emulation()
    x = np.random.default_rng(15).normal(size=(2, 70, 8)).astype(np.float16)
    sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2, storage=storage)
    with using_kernels(target):
        sketch.update(x[:, :66], x[:, :66], queries=x[:, :66])
        before: Any = sketch.state
        target.launches.clear()
        sketch.update(x[:, 66:67], x[:, 66:67], queries=x[:, 66:67])
    after: Any = sketch.state
    assert before.exact.n == 18
    assert after.exact.n == 11
    names = [launch.kernel for launch in target.launches]
    merged = ["weighted_mean", "make_points", "pair_costs", "match_pairs", "merge_pairs"]
    absorbed = ["gather", "angles", "weigh", "query_moment", *merged, "store"]
    assert [name for name in names if name != "quantize_queries"] == absorbed
    assert len(absorbed) == 10


def test_new_clusters_alone_are_compared_with_all_except_every_eighth_time(monkeypatch: pytest.MonkeyPatch) -> None:
    target = cuda_targets.emulation()
    monkeypatch.setattr(algorithm, "FEW_CLUSTERS", 4)
    new = []

    def counting(device: Any, costs: Any, counts: Any, importance: Any, cached: Any, *rest: Any) -> Any:
        new.append((counts >= 0 if cached is None else cached < 0).sum(axis=1).tolist())
        return match(device, costs, counts, importance, cached, *rest)

    match = merging.match
    monkeypatch.setattr(merging, "match", counting)
    x = np.random.default_rng(17).normal(size=(2, 18 + 8 * 17 + 1, 8)).astype(np.float32)
    sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2)
    with using_kernels(target):
        for i in range(0, x.shape[1], 7):  # less than would be replayed
            part = x[:, i : i + 7]
            sketch.update(part, part, queries=part)
    # Four blocks of eight fill the clusters and more; of what merged then, each pair is one new cluster.
    assert len(new) == 18
    for step, streams in enumerate(new):
        most = 24 + 8
        assert all(count == min(most, 8 * (step + 1)) if step < 4 or step % 8 == 0 else 16 <= count < most
                   for count in streams)  # fmt: skip
