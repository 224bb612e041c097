"""Threshold mode: a token joins the cluster of the nearest leader within ``delta``, or opens one of its own.

The leader rule of the paper (UpdateSoftmaxNormalizer), with means in place of samples. Leaders are keys that came,
more than ``delta`` apart, so (m, delta)-clusterable keys open at most m clusters; every member lies within ``delta``
of its leader, and so within ``2 delta`` of the mean.
"""

from __future__ import annotations

from ._array import Array, array_namespace, positions
from .backends import Operations
from .clustering import append_leaders
from .merging import Means, band_means, n_live

__all__ = ["join_leaders"]


def join_leaders(held: Means, more: Means, delta: float, ops: Operations) -> tuple[Means, Array]:
    """Let tokens, or clusters with all their members, join the clusters that are held, or open new ones.

    Parameters
    ----------
    held : Means
        Clusters with leaders, without a gap.
    more : Means
        Clusters that join whole, by their leaders, in this order; the leader of a token is its key. Places that are
        free come last.
    delta : float
        In the units of the keys.
    ops : Operations

    Returns
    -------
    means : Means
        With as many places more as joined.
    assignment : int64 array, shape (streams, places of ``more``)
        The cluster that each joined.
    """
    xp = array_namespace(held.keys)
    wide = held.keys.dtype
    before = n_live(held)
    held = held.with_each(more, lambda a, b: xp.concat([a, xp.zeros_like(b)], axis=1))
    assignment, opened = ops.assign_leaders(more.leaders, held.leaders, before, delta)
    leaders = append_leaders(held.leaders, before, more.leaders, opened)
    member = assignment[:, :, None] == positions(held.counts.shape[1], held.keys)[None, None, :]
    weights = xp.astype(more.counts, wide)[:, :, None]
    by_cluster = xp.matrix_transpose(xp.astype(member, wide))
    added = xp.sum(xp.where(member, more.counts[:, :, None], xp.zeros_like(more.counts[:, :1, None])), axis=1)
    counts = held.counts + xp.astype(added, xp.int32)
    old = xp.astype(held.counts, wide)[:, :, None]
    total = xp.astype(xp.where(counts > 0, counts, xp.ones_like(counts)), wide)[:, :, None]
    # Sums of differences from the mean, or from the leader of a cluster that opens: float32 keeps their digits.
    base = xp.where(old > 0, held.keys, xp.astype(leaders, wide, copy=False))
    difference = more.keys - xp.take_along_axis(base, assignment[:, :, None], axis=1)
    shift = xp.matmul(by_cluster, weights * difference) / total
    value_difference = more.values - xp.take_along_axis(held.values, assignment[:, :, None], axis=1)
    squares = xp.matmul(by_cluster, weights * (band_means(difference * difference) + more.spread))
    spread = (old * held.spread + squares) / total - band_means(shift * shift)
    return Means(
        keys=base + shift,
        values=held.values + xp.matmul(by_cluster, weights * value_difference) / total,
        counts=counts,
        spread=xp.where(spread > 0, spread, xp.zeros_like(spread)),
        importance=held.importance + xp.matmul(by_cluster, more.importance[:, :, None])[:, :, 0],
        leaders=leaders,
    ), assignment
