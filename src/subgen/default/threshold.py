"""Threshold mode: a token joins the cluster of the nearest leader within ``delta``, or opens one of its own.

The leader rule of the paper (UpdateSoftmaxNormalizer), with means in place of samples. Leaders are keys that came,
more than ``delta`` apart, so (m, delta)-clusterable keys open at most m clusters; every member lies within ``delta``
of its leader, and so within ``2 delta`` of the mean.
"""

from __future__ import annotations

from .._array import Array, array_namespace, pieces, positions
from .._tree import concat, tree_map
from ..leaders import append_leaders, assign_leaders
from .merging import band_means, n_live
from .state import Clusters

__all__ = ["join_leaders"]


def join_leaders(held: Clusters, more: Clusters, delta: float) -> tuple[Clusters, Array]:
    """Let tokens, or clusters with all their members, join the clusters that are held, or open new ones.

    Parameters
    ----------
    held : Clusters
        Clusters with leaders, without a gap.
    more : Clusters
        Clusters that join whole, by their leaders, in this order; the leader of a token is its key. Places that are
        free come last.
    delta : float
        In the units of the keys.

    Returns
    -------
    clusters : Clusters
        With as many places more as joined.
    assignment : int64 array, shape (streams, places of ``more``)
        The cluster that each joined.
    """
    xp = array_namespace(held.keys)
    wide = held.keys.dtype
    before = n_live(held)
    held = concat([held, tree_map(xp.zeros_like, more)], axis=1)
    assignment, opened = assign_leaders(more.leaders, held.leaders, before, delta)
    leaders = append_leaders(held.leaders, before, more.leaders, opened)
    weights = xp.astype(more.counts, wide)[:, :, None]
    old = xp.astype(held.counts, wide)[:, :, None]
    # Sums of differences from the mean, or from the leader of a cluster that opens: float32 keeps their digits.
    base = xp.where(old > 0, held.keys, xp.astype(leaders, wide, copy=False))
    difference = more.keys - xp.take_along_axis(base, assignment[:, :, None], axis=1)
    value_difference = more.values - xp.take_along_axis(held.values, assignment[:, :, None], axis=1)
    added, shift, value_shift, squares, importance = _sums_by_cluster(
        assignment,
        held.counts.shape[1],
        more.counts,
        weights * difference,
        weights * value_difference,
        weights * (band_means(difference * difference) + more.key_variance),
        more.importance[:, :, None],
    )
    counts = held.counts + added
    total = xp.astype(xp.where(counts > 0, counts, xp.ones_like(counts)), wide)[:, :, None]
    shift = shift / total
    variance = (old * held.key_variance + squares) / total - band_means(shift * shift)
    return Clusters(
        keys=base + shift,
        values=held.values + value_shift / total,
        counts=counts,
        key_variance=xp.where(variance > 0, variance, xp.zeros_like(variance)),
        importance=held.importance + importance[:, :, 0],
        leaders=leaders,
    ), assignment


def _sums_by_cluster(assignment: Array, places: int, counts: Array, *numbers: Array) -> tuple[Array, ...]:
    """Sum what joins each cluster, a few clusters at a time.

    Parameters
    ----------
    assignment : int64 array, shape (streams, n)
        The place of the cluster that each joins.
    places : int
    counts : int64 array, shape (streams, n)
    *numbers : array, shape (streams, n, ...)

    Returns
    -------
    tuple of array, shape (streams, places) and (streams, places, ...)
    """
    xp = array_namespace(counts)
    streams, n = counts.shape
    zero = xp.zeros_like(counts[:, :1, None])
    place = positions(places, counts)[None, None, :]
    some = []
    for part in pieces(places, streams * n, counts):
        member = assignment[:, :, None] == place[:, :, part]
        added = xp.sum(xp.where(member, counts[:, :, None], zero), axis=1)
        by_cluster = xp.matrix_transpose(xp.astype(member, numbers[0].dtype))
        some.append((added, *(xp.matmul(by_cluster, x) for x in numbers)))
    return concat(some, axis=1)
