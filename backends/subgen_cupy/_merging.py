"""Launches of kernels/merging.cu: a block of tokens merges into the clusters without a question to the host."""

from __future__ import annotations

from dataclasses import replace

from subgen._array import chunks
from subgen._memory import TRANSIENT_NUMBERS_ON_ACCELERATORS
from subgen.merging import Means

from ._launch import MAX_SHARED, Array, Device, Launch, Module, address, ceil_div, element, i32, i64

__all__ = ["MERGING", "MOST_CLUSTERS", "match", "matching_module", "merge", "parts", "shrink", "ward_costs"]

MERGING = Module("merging.cu")
# Blocks that match a stream together, where the device has clusters of blocks; streams up to which they do: with more,
# every processor has a stream of its own; and clusters from which they do.
_PEERS, _FEW_STREAMS, _FEW_CLUSTERS = 8, 32, 512
_GUARDS = 4
_MEAN_TILE, _MEAN_THREADS = 32, 1024
_CHUNK = 16
_POINTS = 64
_SIDE = 128
_WARPS = 8
_THREADS = 256
_MATCH_THREADS = 1024


def _match_shared(n: int, guards: int) -> int:
    """Bytes that the matching of n clusters keeps in shared memory: order, guards, names, list."""
    return 4 * _SIDE * ceil_div(n, _SIDE) + (4 + 2 * guards) * n


# Of the 48 KiB that every device has, what is left beside a few static bytes and columns behind the last cluster.
_MATCH_ROOM = MAX_SHARED - 256 - 4 * _SIDE

# Several times what is bounded elsewhere: with fewer streams at once a device is idle.
_COSTS_AT_ONCE = 4 * TRANSIENT_NUMBERS_ON_ACCELERATORS

#: Clusters of a stream, new tokens included, that the matching has room for.
MOST_CLUSTERS = _MATCH_ROOM // 10


def parts(streams: int, n: int) -> list[slice]:
    """Cut streams of n clusters into parts whose costs of pairs take a gibibyte at most, or are those of one stream."""
    line = _SIDE * ceil_div(n, _SIDE)
    return chunks(streams, max(1, _COSTS_AT_ONCE // line**2))


def _guards(n: int) -> int:
    """Guards that the matching keeps of each cluster."""
    return _GUARDS if (8 + 2 * _GUARDS) * n <= _MATCH_ROOM else 1


def matching_module(peers: int, guards: int) -> Module:
    """Return the matching by so many blocks a stream, with so many guards of each cluster."""
    return Module("matching.cu", constants=(("PEERS", peers), ("GUARDS", guards)))


def ward_costs(device: Device, means: Means, metric: Array | None, value_scale: Array) -> Array:
    """Cost of merging each pair; see `subgen.merging.ward_costs`.

    Parameters
    ----------
    device : Device
    means : subgen.merging.Means
        As `packed` gives it.
    metric : float32 array, shape (streams, head_dim, head_dim), or None
    value_scale : float32 array, shape (streams,)

    Returns
    -------
    float32 array, shape (streams, tiles * 128, tiles * 128)
        With their sign set where a pair is not compared; infinite behind the n-th.
    """
    streams, n, head_dim = means.keys.shape
    value_dim = means.values.shape[-1]
    key_width, value_width = (_CHUNK * ceil_div(dim, _CHUNK) for dim in (head_dim, value_dim))
    mean, norms = device.empty((streams, head_dim), "float32"), device.empty((streams, n), "float32")
    # Of each number a high and a low part, 16 bits each.
    points = device.empty((streams, n, 2 * (key_width + value_width)), "int16")
    mapped = None if metric is None else device.empty((streams, n, 2 * key_width), "int16")
    arguments = [
        *(address(device, x) for x in (means.keys, means.counts)),
        i32(n),
        i32(head_dim),
        address(device, mean),
    ]
    device.run(Launch(MERGING, "weighted_mean", streams * ceil_div(head_dim, _MEAN_TILE), _MEAN_THREADS, arguments))
    arguments = [
        *(address(device, x) for x in (means.keys, means.values, mean, value_scale, metric)),
        *(i32(x) for x in (n, head_dim, value_dim, key_width, value_width)),
        *(address(device, x) for x in (points, mapped, norms)),
    ]
    device.run(Launch(MERGING, "make_points", streams * ceil_div(n, _POINTS), _THREADS, arguments, joins=True))
    squares = ceil_div(n, _SIDE)
    costs = device.empty((streams, squares * _SIDE, squares * _SIDE), "float32")
    mapped_width = key_width + value_width if mapped is None else key_width
    arguments = [
        address(device, points if mapped is None else mapped),
        *(address(device, x) for x in (points, norms, means.counts, means.importance, means.nearest)),
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
    remembered: Array | None,
    most: int,
    places: int,
    moved: Array,
    first: bool,
) -> tuple[Array, Array, Array | None]:
    """Choose pairs as `subgen.merging` does and say which clusters each place of the result comes from.

    Parameters
    ----------
    device : Device
    costs : float32 array, or None
        As `ward_costs` gives them. None if ``most`` is at least n: then clusters only close up.
    counts : int64 array, shape (streams, n)
    importance : float32 array, shape (streams, n)
        An order in which few rows of costs are read; the result does not depend on it.
    remembered : int32 array, shape (streams, n), or None
        The nearest others that clusters remember; see `subgen.merging.Means`.
    most : int
        Pairs merge until this many clusters are left, or there are no more pairs.
    places : int
        Places of the result.
    moved : int64 array, shape (streams, given)
        Where each cluster stands that was given to the first pass: brought up to date.
    first : bool
        Whether this is the first pass; ``moved`` is then written without being read.

    Returns
    -------
    source, other : int32 arrays, shape (streams, places)
        The first and the second of each pair; ``other`` is -1 for a cluster alone, -2 for a free place.
    nearest : int32 array, shape (streams, places), or None
        What the result remembers.
    """
    counts = device.packed(counts, "int64")
    streams, n = counts.shape
    peers = _PEERS if device.clusters and streams <= _FEW_STREAMS and n >= _FEW_CLUSTERS else 1
    source, other = device.empty((streams, places), "int32"), device.empty((streams, places), "int32")
    new_nearest = None if remembered is None else device.empty((streams, places), "int32")
    arguments = [
        *(address(device, x) for x in (costs, counts, importance, remembered)),
        *(i32(x) for x in (n, most, places, moved.shape[1], first)),
        *(address(device, x) for x in (source, other, new_nearest, moved)),
    ]
    guards = _guards(n)
    module, shared = matching_module(peers, guards), _match_shared(n, guards)
    device.run(Launch(module, "match_pairs", streams * peers, _MATCH_THREADS, arguments, shared=shared))
    return source, other, new_nearest


def merge(device: Device, means: Means, source: Array, other: Array, nearest: Array | None) -> Means:
    """Merge the pairs of `match` into new arrays with a place for each; ``nearest`` is that of the result."""
    streams, n, head_dim = means.keys.shape
    places, value_dim, bands = source.shape[1], means.values.shape[-1], means.spread.shape[-1]
    means = replace(means, nearest=None)
    new = means.each(lambda x: device.empty((streams, places, *x.shape[2:]), element(x.dtype)))
    halves = 0 if means.leaders is None else head_dim * means.leaders.dtype.itemsize // 2
    arguments = [
        *(address(device, x) for x in (*means.arrays()[:-1], source, other)),
        i64(streams * places),
        *(i32(x) for x in (n, places, head_dim, value_dim, bands, halves)),
        *(address(device, x) for x in new.arrays()[:-1]),
    ]
    device.run(Launch(MERGING, "merge_pairs", ceil_div(streams * places, _WARPS), _THREADS, arguments))
    return replace(new, nearest=nearest)


def packed(device: Device, means: Means) -> Means:
    """Return the arrays as the kernels read them."""
    return Means(
        keys=device.packed(means.keys, "float32"),
        values=device.packed(means.values, "float32"),
        counts=device.packed(means.counts, "int64"),
        spread=device.packed(means.spread, "float32"),
        importance=device.packed(means.importance, "float32"),
        leaders=None if means.leaders is None else device.packed(means.leaders),
        nearest=None if means.nearest is None else device.packed(means.nearest, "int32"),
    )


def shrink(
    device: Device, means: Means, metric: Array | None, value_scale: Array, most: int, places: int
) -> tuple[Means, Array]:
    """Merge closest pairs until at most a number of clusters is left; see `subgen.merging.merge_closest`.

    A matching halves what there is if it must, so the number of passes follows from the shapes alone.

    Parameters
    ----------
    device : Device
    means : subgen.merging.Means
        In float32, with at most `MOST_CLUSTERS` places and at least one.
    metric, value_scale, most, places
        As in `subgen.merging.merge_closest`.

    Returns
    -------
    means : subgen.merging.Means
    moved : int64 array, shape (streams, places before)
    """
    streams, given = means.counts.shape
    places = min(places, given)
    means, value_scale = packed(device, means), device.packed(value_scale, "float32")
    if metric is not None:
        metric = device.packed(metric, "float32")
    moved = device.empty((streams, given), "int64")
    bound, first = given, True  # of the clusters left in a stream
    while True:
        costs = None if bound <= most else ward_costs(device, means, metric, value_scale)
        bound -= bound // 2
        last = bound <= most
        left = places if last else max(bound, places)
        known = means.counts, means.importance, means.nearest
        means = merge(device, means, *match(device, costs, *known, most, left, moved, first))
        if last:
            return means, moved
        first = False
