"""Compressing a whole prompt, a stream at a time, by writes into one matrix of distances.

The same merges as `subgen.default.prompt`, with less work: only the row of a cluster that has merged is computed again,
and the nearest neighbour of another is searched again only where it has merged and may be the cheapest of all. Where
numba is installed, the merges of a block are one compiled call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen._tree import tree_map
from subgen.default.merging import band_means, bands
from subgen.default.prompt import Prompt, label_tokens, prompt_blocks
from subgen.default.state import Clusters

from ._numba import compiled
from ._parallel import by_streams
from .merging import lossy, points_of

__all__ = ["agglomerate"]

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]

# Products of tokens and clusters that are worth a thread.
_WORTH_A_THREAD = 2**16


def agglomerate(prompt: Prompt, max_clusters: int) -> tuple[Clusters, Integers]:
    """Merge tokens until so many clusters are left; see `subgen.default.prompt.agglomerate`."""
    streams, n = prompt.weights.shape
    dtype, dim = prompt.keys.dtype, prompt.keys.shape[-1]
    labels = np.empty((streams, n), np.int64)

    def made(*shape: int, dtype: Any = dtype) -> NDArray[Any]:
        return np.empty((streams, max_clusters, *shape), dtype)

    clusters = Clusters(
        keys=made(dim),
        values=made(prompt.values.shape[-1]),
        counts=made(dtype=np.int64),
        key_variance=made(bands(dim)),
        importance=made(),
    )
    loops = compiled("prompt")

    def one(s: int) -> None:
        own = tree_map(lambda x: np.ascontiguousarray(x[s]).reshape(x.shape[1:]), prompt)
        labels[s] = _labels(own, max_clusters)
        to = tree_map(lambda x: x[s], clusters)
        if loops is None:
            _summarize(own, labels[s], to)
        else:
            given = (own.keys, own.values, own.weights, labels[s])
            loops.summarize(*given, to.keys, to.values, to.counts, to.key_variance, to.importance)

    by_streams(one, streams, labels.size * max_clusters // _WORTH_A_THREAD, blas=True)
    return clusters, labels


def _summarize(own: Prompt, labels: Integers, to: Clusters) -> None:
    """Describe the clusters of a stream; see `subgen.default.prompt.summarize`."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=to.counts.size)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    number = counts[:, None].astype(own.keys.dtype)
    keys = own.keys.take(order, axis=0)
    mean_keys = np.add.reduceat(keys, starts, axis=0) / number
    difference = keys - mean_keys.take(labels[order], axis=0)
    to.keys[:] = mean_keys
    to.values[:] = np.add.reduceat(own.values.take(order, axis=0), starts, axis=0) / number
    to.counts[:] = counts
    to.key_variance[:] = np.add.reduceat(band_means(difference * difference), starts, axis=0) / number
    to.importance[:] = np.add.reduceat(own.weights.take(order), starts)


def _labels(own: Prompt, max_clusters: int) -> Integers:
    """Find the cluster of each token of a stream."""
    points = points_of(own.keys, own.values, own.keys.mean(axis=0), own.metric, own.value_scale)
    half = np.vecdot(points, points) * points.dtype.type(0.5)
    if not float(half.max()) < float(np.finfo(points.dtype).max) ** 0.5 / 8:  # NaN, too
        found: Integers = label_tokens(tree_map(lambda x: x[None, ...], own), max_clusters)[0]
        return found
    labels = _merge_stream(points, half, own.weights, max_clusters)
    if labels is None:
        return _labels(tree_map(lambda x: x.astype(np.float64), own), max_clusters)
    return labels


class _Pool:
    """The clusters of a stream, which merges write to.

    Attributes
    ----------
    points : array, shape (places, dim)
        Means.
    half, counts, weights : array, shape (places,)
        Half of the squares of the points, numbers of members, and weights.
    cost, nearest : array, shape (places,)
        Of the compiled loops: the cheapest partner of each, and what it costs.
    squared : array, shape (places, places)
        Distances; infinite on the diagonal.
    """

    def __init__(self, places: int, dim: int, dtype: np.dtype[Any]) -> None:
        self.points = np.empty((places, dim), dtype)
        self.half, self.counts, self.weights, self.cost = (np.empty(places, dtype) for _ in range(4))
        self.second, self.price = np.empty(places, dtype), np.empty(places, dtype)
        integer = np.int32 if dtype.itemsize == 4 else np.int64
        self.bits = self.cost.view(integer), self.price.view(integer)
        self.nearest = np.empty(places, np.int32)
        self.squared = np.empty((places, places), dtype)


def _merge_stream(points: Floats, half: Floats, weights: Floats, max_clusters: int) -> Integers | None:
    """Merge the points of a stream; None where float32 does not have the digits."""
    n, dim = points.shape
    blocks = prompt_blocks(n, max_clusters)
    pool = _Pool(min(n, max_clusters + blocks[0].stop), dim, points.dtype)
    loops = compiled("prompt")
    labels = np.empty(n, np.int64)
    held = 0
    for part in blocks:
        size = part.stop - part.start
        total = held + size
        new = slice(held, total)
        pool.points[new], pool.half[new], pool.weights[new] = points[part], half[part], weights[part]
        pool.counts[new] = 1
        products = pool.points[new] @ pool.points[:total].T
        labels[part] = places = np.arange(held, total)
        lost = lossy if loops is None else loops.lossy
        if points.dtype == np.float32 and lost(products, places, pool.half[:total]):
            return None
        given = (pool.points, pool.half, pool.counts, pool.weights, pool.squared, products, max_clusters)
        places = (
            _reduced(*given)
            if loops is None
            else loops.reduced(*given, pool.nearest, pool.cost, pool.second, pool.price, *pool.bits)
        )
        if total > max_clusters:
            labels[: part.stop] = places[labels[: part.stop]]
        held = min(total, max_clusters)
    return labels


def _reduced(
    points: Floats,
    half: Floats,
    counts: Floats,
    weights: Floats,
    squared: Floats,
    products: Floats,
    max_clusters: int,
) -> Integers:
    """Add the distances of new clusters, and merge until so many are left, which come first.

    Parameters
    ----------
    points, half, counts, weights, squared : array
        See `_Pool`. Written.
    products : array, shape (new, clusters)
        Of the points of new clusters and of all.
    max_clusters : int

    Returns
    -------
    int64 array, shape (clusters,)
        The new place of each.
    """
    size, n = products.shape
    held = n - size
    rows = 2 * (half[held:n, None] + half[:n] - products)
    np.maximum(rows, 0, out=rows)
    rows[:, held:] = (rows[:, held:] + rows[:, held:].T) * rows.dtype.type(0.5)
    squared[held:n, :n] = rows
    squared[:held, held:n] = rows[:, :held].T
    squared[np.arange(held, n), np.arange(held, n)] = np.inf
    index, root = np.arange(n), np.arange(n)
    inverse, penalty = 1 / weights[:n], np.zeros(n, points.dtype)
    costs = squared[:n, :n] / (inverse[:, None] + inverse)
    nearest = costs.argmin(axis=1)
    # The cost of a stale cluster, whose nearest is -1, is a bound.
    cost = costs[index, nearest]
    for _ in range(n - max_clusters):
        while nearest[first := int(cost.argmin())] < 0:
            costs = squared[first, :n] / (inverse[first] + inverse) + penalty
            nearest[first] = costs.argmin()
            cost[first] = costs[nearest[first]]
        second = int(nearest[first])
        total = counts[first] + counts[second]
        share = 1 - counts[first] / total
        within = share * (1 - share) * squared[first, second]
        row = (1 - share) * squared[first, :n] + share * squared[second, :n] - within
        np.maximum(row, 0, out=row)
        row[first] = np.inf
        squared[first, :n] = squared[:n, first] = row
        points[first] += (points[second] - points[first]) * share
        counts[first] = total
        weights[first] += weights[second]
        inverse[first] = 1 / weights[first]
        penalty[second] = cost[second] = np.inf
        root[root == second] = first
        costs = row / (inverse[first] + inverse) + penalty
        nearest[(nearest == first) | (nearest == second)] = -1
        closer = (costs < cost) | ((costs == cost) & (first < nearest))
        nearest[closer], cost[closer] = first, costs[closer]
        nearest[first] = costs.argmin()
        cost[first] = costs[nearest[first]]
    gone = penalty > 0
    half[:n] = np.vecdot(points[:n], points[:n]) * half.dtype.type(0.5)
    left = np.flatnonzero(~gone)
    if left.size < n:
        for x in (points, half, counts, weights):
            x[: left.size] = x[left]
        squared[: left.size, : left.size] = squared[left[:, None], left]
    places: Integers = (np.cumsum(~gone) - 1)[root]
    return places
