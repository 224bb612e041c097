"""Launches of kernels/merging.cu: a block of tokens merges into the clusters without a question to the host."""

from __future__ import annotations

from ._launch import MAX_SHARED, Array, Device, Launch, Module, address, ceil_div, i32, i64

__all__ = ["MERGING", "MOST_CLUSTERS", "costs_of_pairs", "match", "merge", "points_of", "shrink"]

MERGING = Module("merging.cu")
_TILE = 32
_WARPS = 8
_THREADS = 256
_MATCH_THREADS = 512

Means = tuple[Array, Array, Array, Array, Array]


def _match_shared(n: int) -> int:
    """Bytes that the matching of n clusters keeps in shared memory: partner, cost, pairs, state."""
    return 4 * (2 * n + n // 2) + n


#: Clusters of a stream, new tokens included, that the matching has room for (with its few static bytes).
MOST_CLUSTERS = (MAX_SHARED - 256) // 11


def points_of(device: Device, means: Means, metric: Array | None, value_scale: Array) -> tuple[Array, Array]:
    """Points whose squared distances, times Ward's factor, are the costs of pairs.

    Parameters
    ----------
    device : Device
    means : (keys, values, counts, spread, importance)
        float32, C-contiguous; see `subgen.merging.Means`.
    metric : float32 array, shape (streams, head_dim), or None
        Diagonal of the metric; None is the identity.
    value_scale : float32 array, shape (streams,)

    Returns
    -------
    points : float32 array, shape (streams, n, head_dim + value_dim)
    norms : float32 array, shape (streams, n)
        Squared.
    """
    keys, values, counts = means[:3]
    streams, n, head_dim = keys.shape
    value_dim = values.shape[-1]
    mean = device.empty((streams, head_dim), "float32")
    points = device.empty((streams, n, head_dim + value_dim), "float32")
    norms = device.empty((streams, n), "float32")
    arguments = [address(device, keys), address(device, counts), i32(n), i32(head_dim), address(device, mean)]
    device.run(Launch(MERGING, "weighted_mean", streams * ceil_div(head_dim, _TILE), _THREADS, arguments))
    arguments = [
        *(address(device, x) for x in (keys, values, mean, metric, value_scale)),
        i64(streams * n),
        *(i32(x) for x in (n, head_dim, value_dim)),
        *(address(device, x) for x in (points, norms)),
    ]
    device.run(Launch(MERGING, "features", ceil_div(streams * n, _WARPS), _THREADS, arguments))
    return points, norms


def costs_of_pairs(device: Device, gram: Array, norms: Array, counts: Array, importance: Array) -> Array:
    """Write Ward's costs over the Gram matrix, shape (streams, n, n), and return it."""
    streams, n, _ = gram.shape
    arguments = [*(address(device, x) for x in (gram, norms, counts, importance)), i32(n)]
    device.run(Launch(MERGING, "pair_costs", streams * ceil_div(n, _TILE) ** 2, _THREADS, arguments))
    return gram


def match(device: Device, costs: Array, counts: Array, most: int, places: int) -> tuple[Array, Array]:
    """Choose pairs as `subgen.merging` does and say which clusters each place of the result comes from.

    Parameters
    ----------
    device : Device
    costs : float32 array, shape (streams, n, n)
    counts : float32 array, shape (streams, n)
    most : int
        Pairs merge until this many clusters are left, or there are no more pairs.
    places : int
        Places of the result.

    Returns
    -------
    source, other : int32 arrays, shape (streams, places)
        The first and the second of each pair; ``other`` is -1 for a cluster alone, -2 for a free place.
    """
    streams, n, _ = costs.shape
    partner, cost = device.empty((streams, n), "int32"), device.empty((streams, n), "float32")
    arguments = [address(device, costs), i64(streams * n), i32(n), address(device, partner), address(device, cost)]
    device.run(Launch(MERGING, "nearest_pairs", ceil_div(streams * n, _WARPS), _THREADS, arguments))
    source, other = device.empty((streams, places), "int32"), device.empty((streams, places), "int32")
    arguments = [
        *(address(device, x) for x in (costs, counts, partner, cost)),
        *(i32(x) for x in (n, most, places)),
        *(address(device, x) for x in (source, other)),
    ]
    device.run(Launch(MERGING, "match_pairs", streams, _MATCH_THREADS, arguments, shared=_match_shared(n)))
    return source, other


def merge(device: Device, means: Means, source: Array, other: Array) -> Means:
    """Merge the pairs of `match` into new arrays with a place for each."""
    keys, values, _, spread, _ = means
    streams, n, head_dim = keys.shape
    places, value_dim, bands = source.shape[1], values.shape[-1], spread.shape[-1]
    shapes = (places, head_dim), (places, value_dim), (places,), (places, bands), (places,)
    new_keys, new_values, new_counts, new_spread, new_importance = (
        device.empty((streams, *shape), "float32") for shape in shapes
    )
    new = new_keys, new_values, new_counts, new_spread, new_importance
    arguments = [
        *(address(device, x) for x in (*means, source, other)),
        *(i32(x) for x in (n, places, head_dim, value_dim, bands)),
        *(address(device, x) for x in new),
    ]
    device.run(Launch(MERGING, "merge_pairs", streams * places, 128, arguments))
    return new


def shrink(device: Device, means: Means, metric: Array | None, value_scale: Array, most: int, places: int) -> Means:
    """Merge closest pairs until at most ``most`` clusters are left, and keep a number of places.

    A matching halves what there is if it must, so the number of passes follows from the shapes alone.

    Parameters
    ----------
    device, means, value_scale
        As in `points_of`.
    metric : float32 array, shape (streams, head_dim) or (streams, head_dim, head_dim), or None
    most, places : int

    Returns
    -------
    (keys, values, counts, spread, importance)
        With ``places`` places, live clusters first.

    Raises
    ------
    ValueError
        If there are more clusters than `MOST_CLUSTERS`, or no room for those that are left.
    """
    n, head_dim = means[0].shape[1:]
    if n > MOST_CLUSTERS:
        raise ValueError(f"at most {MOST_CLUSTERS} clusters with their new tokens merge on the device, got {n}")
    if not 1 <= places <= n or most < 1:
        raise ValueError(f"need 1 <= places <= {n} clusters and most >= 1, got places={places}, most={most}")
    packed = [device.packed(x, "float32") for x in means]
    keys, values, counts, spread, importance = packed
    means = keys, values, counts, spread, importance
    value_scale = device.packed(value_scale, "float32")
    full = metric is not None and len(metric.shape) == 3
    if metric is not None:
        metric = device.packed(metric, "float32")
    xp = device.xp
    while True:
        n = means[0].shape[1]
        left = places if n - n // 2 <= most else max(places, n - n // 2)
        points, norms = points_of(device, means, None if full else metric, value_scale)
        mapped = points
        if full:
            keys = xp.matmul(points[..., :head_dim], metric)
            mapped = xp.concatenate([keys, points[..., head_dim:]], axis=-1)
        gram = device.packed(xp.matmul(mapped, xp.swapaxes(points, -1, -2)))
        if full:
            norms = device.packed(xp.diagonal(gram, axis1=-2, axis2=-1))
        costs = costs_of_pairs(device, gram, norms, means[2], means[4])
        means = merge(device, means, *match(device, costs, means[2], most, left))
        if n - n // 2 <= most:
            return means
