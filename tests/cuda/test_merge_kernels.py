"""The kernels of merge.cu: costs of pairs, and merging down to a number of clusters together with match.cu."""

from __future__ import annotations

from dataclasses import replace

import cuda_targets
import numpy as np
import pytest
from cuda_cases import TOLERANCE, cached_neighbours, exact_clusters
from cuda_targets import DTYPES, Target, using_device
from subgen_cupy import merging
from subgen_cupy.merging import shrink, ward_costs

from subgen._tree import leaves, tree_map
from subgen.backends import PORTABLE
from subgen.default import merging as portable
from subgen.default.state import Clusters


@pytest.mark.parametrize("new", [None, 0.2])
@pytest.mark.parametrize(("n", "head_dim", "value_dim"), [(1, 8, 8), (31, 8, 3), (70, 64, 64)])
def test_costs_equal_the_portable_ones_to_the_last_bit(
    target: Target, n: int, head_dim: int, value_dim: int, new: float | None
) -> None:
    rng = np.random.default_rng(8)
    clusters = exact_clusters(rng, 2, n, head_dim, value_dim)
    value_scale = np.float32([0.5, 2.0])
    root = rng.integers(-1, 2, size=(2, head_dim, head_dim)).astype(np.float32)
    compared = np.ones((2, n, n), bool)
    if new is not None:
        clusters = replace(clusters, nearest=cached_neighbours(rng, clusters.counts, new))
        compared = portable._compared(clusters.nearest, clusters.counts > 0, np.zeros((2, 1)))
    for metric in (None, root @ root.swapaxes(1, 2)):
        costs = ward_costs(target.device, *map(target.put, (clusters, metric, value_scale)))
        got, expected = target.get(costs)[:, :n, :n], portable.ward_costs(clusters, metric, value_scale)
        np.testing.assert_array_equal(abs(got), expected)
        np.testing.assert_array_equal(np.signbit(got), ~compared & np.isfinite(expected))
        np.testing.assert_array_equal(got, got.swapaxes(1, 2))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_costs_are_as_good_as_in_float32(target: Target, offset: float) -> None:
    rng = np.random.default_rng(10)
    keys, values = rng.normal(size=(2, 2, 130, 64)) + offset
    counts, importance = rng.integers(0, 9, size=(2, 130)), rng.random((2, 130)) + 0.1
    wide = Clusters(keys, values - offset, counts, np.zeros((2, 130, 4)), importance)
    clusters = replace(tree_map(lambda x: x.astype(np.float32), wide), counts=counts)
    root = rng.normal(size=(2, 64, 64)) / 8
    metric = root @ root.swapaxes(1, 2)
    arrays = clusters, metric.astype(np.float32), np.float32([1.0, 2.0])
    costs = ward_costs(target.device, *map(target.put, arrays))
    expected = portable.ward_costs(wide, metric, np.array([1.0, 2.0]))
    got = target.get(costs)[:, :130, :130]
    np.testing.assert_allclose(got, expected, rtol=2e-5 if offset == 0 else 2e-4)
    np.testing.assert_array_equal(got, got.swapaxes(1, 2))


def test_a_cost_is_infinite_only_where_clusters_cannot_merge(target: Target) -> None:
    clusters = exact_clusters(np.random.default_rng(5), 1, 20, 8, 8)
    clusters = replace(clusters, keys=clusters.keys * np.float32(1e18))
    costs = ward_costs(target.device, target.put(clusters), None, target.put(np.ones(1, np.float32)))
    live = clusters.counts[0] > 0
    possible = live[:, None] & live[None, :] & ~np.eye(20, dtype=bool)
    np.testing.assert_array_equal(np.isfinite(target.get(costs)[0, :20, :20]), possible)


@pytest.mark.parametrize("new", [None, 1.0, 0.6])
@pytest.mark.parametrize(
    ("n", "max_clusters", "capacity", "head_dim", "value_dim", "dtype"),
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
    target: Target,
    n: int,
    max_clusters: int,
    capacity: int,
    head_dim: int,
    value_dim: int,
    dtype: str | None,
    new: float | None,
) -> None:
    target = target.seeded(n)
    rng = np.random.default_rng(n)
    # Streams from which much, little and nothing has to go, by the shares of free places.
    clusters = exact_clusters(rng, 3, n, head_dim, value_dim, (0.1,) if new is None else (0.0, 0.4, 0.8))
    if new is not None:
        clusters = replace(clusters, nearest=cached_neighbours(rng, clusters.counts, new))
    if dtype is not None:
        clusters = replace(clusters, leaders=rng.normal(size=clusters.keys.shape).astype(DTYPES[dtype]))
    value_scale = np.float32([1.0, 2.0, 0.5])
    got, assignment = target.get(
        shrink(target.device, target.put(clusters), None, target.put(value_scale), max_clusters, capacity)
    )
    # NumPy's take_along_axis does without an order of bfloat16: leaders follow as the numbers of their places.
    numbered = replace(clusters, leaders=np.broadcast_to(np.arange(n)[None, :, None], (3, n, 1)))
    expected, expected_assignment = PORTABLE["merge_closest"](numbered, None, value_scale, max_clusters, capacity)
    live = expected.counts > 0
    np.testing.assert_array_equal(assignment, expected_assignment)
    assert got.counts.dtype == np.int64
    np.testing.assert_array_equal(got.counts, expected.counts)
    for name in ("keys", "values", "key_variance", "importance"):
        np.testing.assert_allclose(getattr(got, name)[live], getattr(expected, name)[live], err_msg=name, **TOLERANCE)
    if new is None:
        assert got.nearest is None
    else:
        assert got.nearest.dtype == np.int32
        np.testing.assert_array_equal(got.nearest, expected.nearest)
    if dtype is None:
        assert got.leaders is None
    else:
        leaders = np.take_along_axis(clusters.leaders, expected.leaders, axis=1)
        assert got.leaders.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(got.leaders[live], leaders[live])


def test_counts_times_a_power_of_two_merge_alike(target: Target) -> None:
    """All counts times 2^40: the same clusters merge, to the same bits, and counts are exact."""
    rng = np.random.default_rng(7)
    clusters = exact_clusters(rng, 3, 90, 8, 8, (0.0, 0.4, 0.8))
    clusters = replace(clusters, nearest=cached_neighbours(rng, clusters.counts, 0.5))
    scale = target.put(np.float32([1.0, 2.0, 0.5]))
    results = []
    for counts in (clusters.counts, clusters.counts << 40):
        given = target.put(replace(clusters, counts=counts))
        merged, assignment = target.get(shrink(target.device, given, None, scale, 20, 25))
        results.append({**dict(leaves(merged)), "assignment": assignment})
    few, many = results
    assert many["counts"].dtype == np.int64
    np.testing.assert_array_equal(many.pop("counts"), few.pop("counts") << 40)
    assert few.keys() == many.keys() >= {"keys", "nearest", "assignment"}
    for name in few:
        np.testing.assert_array_equal(many[name], few[name], err_msg=name)


def test_streams_merge_in_parts_where_their_costs_take_too_much_memory(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    clusters = exact_clusters(rng, 3, 32, 8, 8, (0.1, 0.0, 0.2))
    metric = np.stack([np.eye(8, dtype=np.float32) * s for s in (1, 2, 4)])
    given = *map(target.put, (clusters, metric, np.float32([1, 2, 1]))), 20, 20
    with using_device(target):
        together = target.get(merging.merge_closest(*given))
        monkeypatch.setattr(merging, "_COSTS_AT_ONCE", 2 * 128 * 128)  # two streams, rounded up to whole tiles
        assert merging.stream_parts(3, 32) == [slice(0, 2), slice(2, 3)]
        in_parts = target.get(merging.merge_closest(*given))
    np.testing.assert_array_equal(in_parts[1], together[1])
    mine, expected = dict(leaves(in_parts[0])), dict(leaves(together[0]))
    assert mine.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(mine[name], x, err_msg=name)


def test_where_nothing_has_to_merge_the_clusters_only_close_gaps() -> None:
    target = cuda_targets.emulation()
    rng = np.random.default_rng(3)
    clusters = exact_clusters(rng, 2, 50, 8, 8)
    clusters = replace(clusters, nearest=cached_neighbours(rng, clusters.counts, 0.3))
    got, assignment = shrink(target.device, clusters, None, np.ones(2, np.float32), 50, 50)
    assert [launch.kernel for launch in target.launches] == ["match_pairs", "merge_pairs"]
    for s in range(2):
        np.testing.assert_array_equal(got.keys[s][assignment[s]], clusters.keys[s])
        nearest = clusters.nearest[s]
        expected = np.where(nearest < 0, -1, assignment[s][nearest])
        np.testing.assert_array_equal(got.nearest[s][assignment[s]], expected)


def test_as_many_merge_as_must_whatever_is_cached(target: Target) -> None:
    """One is the cached neighbour of all: then all are compared, and the number of passes follows from shapes alone."""
    rng = np.random.default_rng(6)
    clusters = exact_clusters(rng, 2, 90, 8, 8)
    clusters = replace(clusters, counts=np.ones_like(clusters.counts), nearest=np.full((2, 90), 7, np.int32))
    clusters.nearest[:, 7] = 30
    scale = target.put(np.ones(2, np.float32))
    for left in (89, 50, 20):
        got, assignment = target.get(shrink(target.device, target.put(clusters), None, scale, left, left))
        assert (got.counts > 0).all()
        for s in range(2):
            np.testing.assert_array_equal(np.bincount(assignment[s], minlength=left), got.counts[s])
        assert ((got.nearest < left) & (got.nearest != np.arange(left))).all()


@pytest.mark.parametrize("metric", ["none", "full"])
@pytest.mark.parametrize("unit", [1, 1 << 33])
def test_merging_keeps_mass_means_and_second_moments(target: Target, metric: str, unit: int) -> None:
    """Also with counts beyond 32 bits: the sums of counts are exact."""
    rng = np.random.default_rng(9)
    streams, n, head_dim = 2, 120, 16
    keys, values = rng.normal(size=(2, streams, n, head_dim)) + 5.0
    counts, importance = rng.integers(1, 9, size=(streams, n)) * unit, rng.random((streams, n)) + 0.1
    counts += rng.integers(0, 2, size=(streams, n)) * (unit > 1)  # float32 does not hold these
    variance = rng.random((streams, n, 4))
    arrays = (np.asarray(x, dtype=np.float32) for x in (keys, values, counts, variance, importance))
    clusters = replace(Clusters(*arrays), counts=counts)
    root = rng.normal(size=(streams, head_dim, head_dim)).astype(np.float32)
    given = None if metric == "none" else target.put(root @ root.swapaxes(1, 2))
    scale = target.put(np.ones(streams, dtype=np.float32))
    new, assignment = target.get(shrink(target.device, target.put(clusters), given, scale, 50, 50))
    members = np.zeros((streams, 50), dtype=np.int64)
    for s in range(streams):
        np.add.at(members[s], assignment[s], counts[s])
    np.testing.assert_array_equal(new.counts, members)
    assert (new.counts > 0).sum(axis=1).tolist() == [50, 50]

    def moments(x: Clusters) -> list[np.ndarray]:
        w = x.counts[:, :, None].astype(np.float64)
        second = x.key_variance + portable.band_means(x.keys.astype(np.float64) ** 2)
        return [w.sum(axis=1), (w * x.keys).sum(axis=1), (w * x.values).sum(axis=1), (w * second).sum(axis=1)]

    for mine, before in zip(moments(new), moments(clusters), strict=True):
        np.testing.assert_allclose(mine, before, rtol=1e-5)
    np.testing.assert_allclose(new.importance.sum(axis=1), clusters.importance.sum(axis=1), rtol=1e-5)
