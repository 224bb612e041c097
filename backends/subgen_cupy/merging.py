"""Launches of kernels/merge.cu and match.cu: merge the closest pairs of clusters, without synchronisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from subgen._array import TRANSIENT_NUMBERS_ON_ACCELERATORS, chunks
from subgen._tree import leaves, tree_map
from subgen.default.merging import merge_streams
from subgen.default.state import Clusters

from .device import device_of
from .launch import MAX_SHARED, Array, Device, Launch, Module, address, ceil_div, element, i32, i64, kernel

__all__ = [
    "MAX_CLUSTERS",
    "MERGING",
    "match",
    "matching_module",
    "merge",
    "merge_closest",
    "packed",
    "shrink",
    "stream_parts",
    "ward_costs",
]

MERGING = Module("merge.cu")
# Where the device has clusters of blocks, so many blocks match a stream together: up to so many streams, as with more
# every multiprocessor has a stream to itself, and from so many clusters on.
_PEERS, _FEW_STREAMS, _FEW_CLUSTERS = 8, 32, 512
_BLOCKERS = 4
_MEAN_TILE, _MEAN_THREADS = 32, 1024
_CHUNK = 16
_POINTS = 64
_SIDE = 128
_WARPS = 8
_THREADS = 256
_MATCH_THREADS = 1024


def _match_shared(n: int, blockers: int) -> int:
    """Bytes of shared memory for the matching of n clusters: order, blockers, proposals, list."""
    return 4 * _SIDE * ceil_div(n, _SIDE) + (4 + 2 * blockers) * n


# What a few static bytes and the columns behind the last cluster leave of the 48 KiB of every device.
_MATCH_SPACE = MAX_SHARED - 256 - 4 * _SIDE

#: Clusters of a stream, new tokens included, that the matching has space for.
MAX_CLUSTERS = _MATCH_SPACE // 10

# Four times the limit of other operations: with fewer streams at once a device is idle.
_COSTS_AT_ONCE = 4 * TRANSIENT_NUMBERS_ON_ACCELERATORS


def stream_parts(streams: int, n: int) -> list[slice]:
    """Cut streams of n clusters into parts of one stream each, or of more whose costs take at most a gibibyte."""
    line = _SIDE * ceil_div(n, _SIDE)
    return chunks(streams, max(1, _COSTS_AT_ONCE // line**2))


def _n_blockers(n: int) -> int:
    """Blockers that the matching keeps of each of n clusters."""
    return _BLOCKERS if (8 + 2 * _BLOCKERS) * n <= _MATCH_SPACE else 1


def matching_module(peers: int, blockers: int) -> Module:
    """Return the matching with so many blocks of threads a stream, and so many blockers of each cluster."""
    return Module("match.cu", constants=(("PEERS", peers), ("BLOCKERS", blockers)))


def ward_costs(device: Device, clusters: Clusters, metric: Array | None, value_scale: Array) -> Array:
    """Compute the cost of merging each pair; see `subgen.default.merging.ward_costs`.

    Parameters
    ----------
    device : Device
    clusters : Clusters
        As `packed` gives it.
    metric : float32 array, shape (streams, head_dim, head_dim), or None
    value_scale : float32 array, shape (streams,)

    Returns
    -------
    float32 array, shape (streams, tiles * 128, tiles * 128)
        The sign bit is set where a pair is not compared; infinite behind the n-th.
    """
    streams, n, head_dim = clusters.keys.shape
    value_dim = clusters.values.shape[-1]
    key_width, value_width = (_CHUNK * ceil_div(dim, _CHUNK) for dim in (head_dim, value_dim))
    mean, norms = device.empty((streams, head_dim), "float32"), device.empty((streams, n), "float32")
    # Of each number a high and a low part, 16 bits each.
    points = device.empty((streams, n, 2 * (key_width + value_width)), "int16")
    mapped = None if metric is None else device.empty((streams, n, 2 * key_width), "int16")
    arguments = [
        *(address(device, x) for x in (clusters.keys, clusters.counts)),
        i32(n),
        i32(head_dim),
        address(device, mean),
    ]
    device.run(Launch(MERGING, "weighted_mean", streams * ceil_div(head_dim, _MEAN_TILE), _MEAN_THREADS, arguments))
    arguments = [
        *(address(device, x) for x in (clusters.keys, clusters.values, mean, value_scale, metric)),
        *(i32(x) for x in (n, head_dim, value_dim, key_width, value_width)),
        *(address(device, x) for x in (points, mapped, norms)),
    ]
    device.run(Launch(MERGING, "make_points", streams * ceil_div(n, _POINTS), _THREADS, arguments, joins=True))
    squares = ceil_div(n, _SIDE)
    costs = device.empty((streams, squares * _SIDE, squares * _SIDE), "float32")
    mapped_width = key_width + value_width if mapped is None else key_width
    arguments = [
        address(device, points if mapped is None else mapped),
        *(address(device, x) for x in (points, norms, clusters.counts, clusters.importance, clusters.nearest)),
        *(i32(x) for x in (n, key_width, value_width, mapped_width)),
        address(device, costs),
    ]
    device.run(Launch(MERGING, "pair_costs", streams * (squares * (squares + 1) // 2), _THREADS, arguments))
    return costs


def match(
    device: Device,
    costs: Array | None,
    counts: Array,
    importance: Array,
    cached: Array | None,
    max_clusters: int,
    capacity: int,
    assignment: Array,
    first: bool,
) -> tuple[Array, Array, Array | None]:
    """Choose pairs as `subgen.default.merging` does; return which clusters each place of the result comes from.

    Parameters
    ----------
    device : Device
    costs : float32 array, or None
        From `ward_costs`. ``None`` if ``max_clusters`` is at least n: clusters then only close gaps.
    counts : int64 array, shape (streams, n)
    importance : float32 array, shape (streams, n)
        Clusters are matched in this order, in which few rows of costs are read; the result does not depend on it.
    cached : int32 array, shape (streams, n), or None
        Cached nearest neighbours; see `subgen.default.state.Clusters`.
    max_clusters : int
        Pairs merge until this many clusters are left, or there are no more pairs.
    capacity : int
        Places of the result.
    assignment : int64 array, shape (streams, given)
        Updated: the place of each cluster that was given to the first pass.
    first : bool
        Whether this is the first pass; ``assignment`` is then written without being read.

    Returns
    -------
    source, other : int32 arrays, shape (streams, capacity)
        The first and the second of each pair; ``other`` is -1 for an unpaired cluster, -2 for a free place.
    nearest : int32 array, shape (streams, capacity), or None
        Cached neighbours of the result.
    """
    streams, n = counts.shape
    peers = _PEERS if device.clusters and streams <= _FEW_STREAMS and n >= _FEW_CLUSTERS else 1
    source, other = device.empty((streams, capacity), "int32"), device.empty((streams, capacity), "int32")
    nearest = None if cached is None else device.empty((streams, capacity), "int32")
    arguments = [
        *(address(device, x) for x in (costs, counts, importance, cached)),
        *(i32(x) for x in (n, max_clusters, capacity, assignment.shape[1], first)),
        *(address(device, x) for x in (source, other, nearest, assignment)),
    ]
    blockers = _n_blockers(n)
    module, shared = matching_module(peers, blockers), _match_shared(n, blockers)
    device.run(Launch(module, "match_pairs", streams * peers, _MATCH_THREADS, arguments, shared=shared))
    return source, other, nearest


def merge(device: Device, clusters: Clusters, source: Array, other: Array, nearest: Array | None) -> Clusters:
    """Merge the pairs of `match` into new arrays with a place for each; ``nearest`` becomes that of the result."""
    streams, n, head_dim = clusters.keys.shape
    places, value_dim, bands = source.shape[1], clusters.values.shape[-1], clusters.key_variance.shape[-1]
    clusters = replace(clusters, nearest=None)
    new = tree_map(lambda x: device.empty((streams, places, *x.shape[2:]), element(x.dtype)), clusters)
    halves = 0 if clusters.leaders is None else head_dim * clusters.leaders.dtype.itemsize // 2
    arguments = [
        *(address(device, x) for x in (*_arrays(clusters), source, other)),
        i64(streams * places),
        *(i32(x) for x in (n, places, head_dim, value_dim, bands, halves)),
        *(address(device, x) for x in _arrays(new)),
    ]
    device.run(Launch(MERGING, "merge_pairs", ceil_div(streams * places, _WARPS), _THREADS, arguments))
    return replace(new, nearest=nearest)


def _arrays(clusters: Clusters) -> list[Array | None]:
    """List the arrays as the kernel takes them."""
    names = ("keys", "values", "counts", "key_variance", "importance", "leaders")
    return [getattr(clusters, name) for name in names]


def packed(device: Device, clusters: Clusters) -> Clusters:
    """Return the arrays as the kernels read them."""
    dtypes = {"counts": "int64", "nearest": "int32", "leaders": None}
    return replace(clusters, **{name: device.packed(x, dtypes.get(name, "float32")) for name, x in leaves(clusters)})


def _merges(clusters: Clusters, metric: Array | None, value_scale: Array, max_clusters: int, capacity: int) -> bool:
    some = max_clusters > 0 and 0 not in clusters.keys.shape
    return some and element(clusters.keys.dtype) == "float32" and clusters.counts.shape[1] <= MAX_CLUSTERS


@kernel(when=_merges)
def merge_closest(
    clusters: Clusters, metric: Array | None, value_scale: Array, max_clusters: int, capacity: int
) -> tuple[Clusters, Array]:
    """Merge closest pairs of clusters; see `subgen.default.merging.merge_closest`.

    In float32, and up to as many clusters as the matching has space for, without synchronisation. Streams merge one
    part after the other where the costs of all would take too much memory.
    """
    device, parts = device_of(clusters.keys), stream_parts(*clusters.counts.shape)
    if len(parts) == 1:
        return shrink(device, clusters, metric, value_scale, max_clusters, capacity)
    return merge_streams(partial(shrink, device), parts, clusters, metric, value_scale, max_clusters, capacity)


def shrink(
    device: Device, clusters: Clusters, metric: Array | None, value_scale: Array, max_clusters: int, capacity: int
) -> tuple[Clusters, Array]:
    """Do what `merge_closest` does, on a device.

    A matching can halve the clusters, so the number of passes follows from the shapes alone.
    """
    streams, given = clusters.counts.shape
    capacity = min(capacity, given)
    clusters, value_scale = packed(device, clusters), device.packed(value_scale, "float32")
    if metric is not None:
        metric = device.packed(metric, "float32")
    assignment = device.empty((streams, given), "int64")
    bound, first = given, True  # on the number of clusters left in a stream
    while True:
        costs = None if bound <= max_clusters else ward_costs(device, clusters, metric, value_scale)
        bound -= bound // 2
        last = bound <= max_clusters
        left = capacity if last else max(bound, capacity)
        given_to_match = clusters.counts, clusters.importance, clusters.nearest
        matched = match(device, costs, *given_to_match, max_clusters, left, assignment, first)
        clusters = merge(device, clusters, *matched)
        if last:
            return clusters, assignment
        first = False
