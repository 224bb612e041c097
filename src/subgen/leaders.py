"""Online clustering of the keys: the leader rule of UpdateSoftmaxNormalizer, a block at a time.

A key joins its nearest representative if that lies within ``delta``, and opens a cluster of its own otherwise.
On (m, delta)-clusterable keys at most m clusters open, since representatives are more than ``delta`` apart.
"""

from __future__ import annotations

import math

from ._array import Array, array_namespace, chunks, pieces, positions, transient_limit
from ._tree import concat
from .backends import operation

__all__ = ["append_leaders", "assign_leaders", "padded_capacity", "squared_distances"]


def squared_distances(points: Array, others: Array) -> Array:
    """Squared Euclidean distances by one matrix product.

    Computed in float64: in float32 the product form loses every digit once the keys share a large offset.
    What lies below the resolution of float32 keys is zero, so that equal keys are equal.

    Parameters
    ----------
    points : array, shape (streams, n, head_dim)
    others : array, shape (streams, c, head_dim)

    Returns
    -------
    float64 array, shape (streams, n, c)
    """
    xp = array_namespace(points)
    a, b = xp.astype(points, xp.float64, copy=False), xp.astype(others, xp.float64, copy=False)
    norms = xp.sum(a * a, axis=-1)[:, :, None] + xp.sum(b * b, axis=-1)[:, None, :]
    squared = norms - 2.0 * xp.matmul(a, xp.matrix_transpose(b))
    # The rounding of a float64 dot product of head_dim terms, relative to the norms.
    resolution = (points.shape[-1] + 4) * 2.0**-52
    return xp.where(squared > norms * resolution, squared, xp.zeros_like(squared))


@operation
def assign_leaders(keys: Array, centres: Array, n_clusters: Array, delta: float) -> tuple[Array, Array]:
    """Assign a block of keys to clusters, as if they came one by one.

    Distances to the present representatives and within the block are two matrix products; the sequential part
    takes one step per cluster that opens, not one per token.

    Parameters
    ----------
    keys : array, shape (streams, n, head_dim)
    centres : array, shape (streams, capacity, head_dim)
        Representatives; those at ``n_clusters`` and beyond are padding.
    n_clusters : int64 array, shape (streams,)
    delta : float
        Radius of a cluster, in the units of the keys.

    Returns
    -------
    assignment : int64 array, shape (streams, n)
        The cluster of each key; clusters that open are numbered on from ``n_clusters``. Equal distances go to
        the oldest.
    opened : bool array, shape (streams, n)
        Whether the key opened its cluster and is its representative.
    """
    streams, n = keys.shape[:2]
    if len(pieces(n, n, keys)) > 1:
        return _assign_in_parts(keys, centres, n_clusters, delta)
    parts = pieces(streams, n * max(n, centres.shape[1]), keys)
    some = [_assign(keys[part, ...], centres[part, ...], n_clusters[part], delta) for part in parts]
    return concat(some, axis=0)


def _assign_in_parts(keys: Array, centres: Array, n_clusters: Array, delta: float) -> tuple[Array, Array]:
    """Assign one part of a long block after the other: the distances within each are bounded."""
    xp = array_namespace(keys)
    some = []
    for part in chunks(keys.shape[1], math.isqrt(transient_limit(keys))):
        assignment, opened = assign_leaders(keys[:, part, :], centres, n_clusters, delta)
        after = n_clusters + xp.sum(xp.astype(opened, xp.int64), axis=-1)
        lacking = max(0, int(xp.max(after)) - centres.shape[1])
        centres = xp.concat([centres, xp.zeros_like(keys[:, :lacking, :])], axis=1)
        centres = append_leaders(centres, n_clusters, keys[:, part, :], opened)
        n_clusters = after
        some.append((assignment, opened))
    return concat(some, axis=1)


def _assign(keys: Array, centres: Array, n_clusters: Array, delta: float) -> tuple[Array, Array]:
    """Assign the keys of all streams together; see `assign_leaders`."""
    xp = array_namespace(keys)
    n = keys.shape[1]
    assignment, nearest = _nearest_centres(keys, centres, n_clusters)
    opened = xp.zeros_like(nearest, dtype=xp.bool)
    uncovered = xp.sqrt(nearest) > delta
    if not bool(xp.any(uncovered)):
        return assignment, opened

    within = squared_distances(keys, keys)
    token = positions(n, keys)[None, :]
    next_cluster = n_clusters[:, None]
    while bool(xp.any(uncovered)):
        # The nearest leader of every token before the first uncovered one is final.
        opens = xp.any(uncovered, axis=-1, keepdims=True)
        leader = xp.argmax(xp.astype(uncovered, xp.int8), axis=-1, keepdims=True)
        distance = xp.take_along_axis(within, leader[:, :, None], axis=1)[:, 0, :]
        is_leader = opens & (token == leader)
        joins = is_leader | (opens & (token > leader) & (distance < nearest))
        nearest = xp.where(is_leader, xp.zeros_like(nearest), xp.where(joins, distance, nearest))
        assignment = xp.where(joins, next_cluster, assignment)
        opened = opened | is_leader
        next_cluster = next_cluster + xp.astype(opens, xp.int64)
        uncovered = xp.sqrt(nearest) > delta
    return assignment, opened


def _nearest_centres(keys: Array, centres: Array, n_clusters: Array) -> tuple[Array, Array]:
    """Find the nearest representative of each key, and its squared distance: ``(streams, n)`` each."""
    xp = array_namespace(keys)
    live = positions(centres.shape[1], keys)[None, None, :] < n_clusters[:, None, None]
    nearest = []
    for part in pieces(keys.shape[1], keys.shape[0] * centres.shape[1], keys):
        squared = squared_distances(keys[:, part, :], centres)
        squared = xp.where(live, squared, xp.full_like(squared, math.inf))
        nearest.append((xp.argmin(squared, axis=-1), xp.min(squared, axis=-1)))
    return concat(nearest, axis=1)


def padded_capacity(n_clusters: int) -> int:
    """Return the capacity of the arrays for a number of clusters: at most a fifth of padding, beyond 32.

    A function of the number alone, so that the memory held does not depend on how the stream was cut.

    Examples
    --------
    >>> [padded_capacity(n) for n in (0, 8, 9, 64, 65, 1000)]
    [8, 8, 16, 64, 80, 1024]
    """
    step = max(8, 1 << max(0, (n_clusters - 1).bit_length() - 3))
    return max(8, -(-n_clusters // step) * step)


def append_leaders(centres: Array, n_clusters: Array, keys: Array, opened: Array) -> Array:
    """Write the keys that opened clusters behind the representatives, whose array must have the capacity.

    Parameters
    ----------
    centres : array, shape (streams, capacity, head_dim)
    n_clusters : int64 array, shape (streams,)
        Clusters before the block.
    keys : array, shape (streams, n, head_dim)
    opened : bool array, shape (streams, n)

    Returns
    -------
    array, shape (streams, capacity, head_dim)
    """
    xp = array_namespace(keys)
    # A stable sort brings the leaders to the front in the order in which they came.
    leaders = xp.argsort(xp.astype(~opened, xp.int8), axis=-1, stable=True)
    place = positions(centres.shape[1], keys)[None, :] - n_clusters[:, None]
    is_new = (place >= 0) & (place < xp.sum(xp.astype(opened, xp.int64), axis=-1)[:, None])
    token = xp.take_along_axis(leaders, xp.where(is_new, place, xp.zeros_like(place)), axis=-1)
    fresh = xp.take_along_axis(keys, token[:, :, None], axis=1)
    return xp.where(is_new[:, :, None], fresh, centres)
