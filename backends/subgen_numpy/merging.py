"""Merging closest pairs: a stream at a time, so that the costs of its pairs stay in the cache.

The same pairs as `subgen.default.merging`, with less work: costs are computed for the compared pairs only and written
over the product they come from, each cluster's cheapest partner is searched again only where it was taken,
and only the pairs that merge are touched. Where numba is installed, the loops over pairs are compiled, with the same
results to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen._array import chunks
from subgen._tree import leaves, tree_map
from subgen.default.merging import DIGITS, SAMPLED, band_means
from subgen.default.state import Clusters

from ._numba import compiled
from ._parallel import by_streams

__all__ = ["WORTH_A_THREAD", "lossy", "merge_closest", "merge_stream", "points_of"]

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]

# Rows of costs worked on at once: with their factors they fit a cache of half a megabyte.
_ROWS = 48
# Rows gathered at once.
_GATHERED = 256
# Numbers of costs copied at once to look for the cheapest.
_LOOKED_AT = 2**20
# Clusters that are worth a thread.
WORTH_A_THREAD = 512


def merge_closest(
    clusters: Clusters, metric: Floats | None, value_scale: Floats, max_clusters: int, capacity: int
) -> tuple[Clusters, Integers]:
    """Merge closest pairs until at most ``max_clusters`` are left; see `subgen.default.merging.merge_closest`."""
    streams, n = clusters.counts.shape
    capacity = min(capacity, n)
    result = tree_map(lambda x: np.empty((streams, capacity, *x.shape[2:]), x.dtype), clusters)
    assignment = np.empty((streams, n), np.int64)
    spaces: list[_Space] = []  # each is used by one thread at a time

    def one(stream: int) -> None:
        own, to = (tree_map(lambda x: x[stream], tree) for tree in (clusters, result))
        own_metric = None if metric is None else metric[stream % metric.shape[0]]
        try:
            space = spaces.pop()
        except IndexError:
            space = _Space(clusters.keys.dtype)
        assignment[stream] = merge_stream(own, own_metric, value_scale[stream], max_clusters, to, space)
        spaces.append(space)

    # Without compiled loops the interpreter's lock is held for most of the time.
    by_streams(one, streams, clusters.counts.size // WORTH_A_THREAD if compiled("merge") else 1, blas=True)
    return result, assignment


class _Space:
    """Memory for the costs of the pairs of one stream after the other, allocated when the first of them needs it."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._numbers: Floats = np.empty(0, dtype)

    def array(self, m: int, n: int) -> Floats:
        """Return an array of a shape, which overwrites the one before."""
        if self._numbers.size < m * n:
            dtype = self._numbers.dtype
            self._numbers = np.empty(0, dtype)  # the old one is freed first
            self._numbers = np.empty(m * n, dtype)
        return self._numbers[: m * n].reshape(m, n)


def merge_stream(
    own: Clusters, metric: Floats | None, value_scale: Any, max_clusters: int, to: Clusters, space: _Space
) -> Integers:
    """Merge the clusters of a stream.

    Parameters
    ----------
    own, metric, value_scale, max_clusters
        Of one stream; see `subgen.default.merging.merge_closest`.
    to : Clusters
        Written: the clusters first, in their order, and zeros in free places.
    space : _Space
        Memory for costs.

    Returns
    -------
    int64 array, shape (n,)
        The new place of each.
    """
    n = own.counts.size
    left = np.flatnonzero(own.counts > 0)
    root = np.arange(n)  # the cluster that each became part of
    found = own if left.size == n else tree_map(lambda x: x.take(left, axis=0), own)
    if left.size < n and found.nearest is not None:
        found = replace(found, nearest=_renumbered(found.nearest, left, n))
    merges = left.size > max_clusters
    while left.size > max_clusters:
        first, second, nearest = _choose(found, metric, value_scale, left.size - max_clusters, space)
        stays = np.ones(left.size, bool)
        stays[second] = False
        step = np.arange(n)
        step[left[second]] = left[first]
        root = step[root]
        if found.nearest is not None:
            found = replace(found, nearest=nearest)
        last = left.size - first.size <= max_clusters
        found, left = _merge(found, first, second, np.flatnonzero(stays), to if last else None), left[stays]
    free = np.ones(n, bool)
    free[left] = False
    place = np.empty(n, np.int64)
    place[left], place[free] = np.arange(left.size), np.arange(left.size, n)
    for (name, written), (_, x) in zip(leaves(to), leaves(found), strict=True):
        if not merges:  # otherwise the last pass wrote them
            written[: left.size] = x
        written[left.size :] = -1 if name == "nearest" else 0
    assignment: Integers = place[root]
    return assignment


@dataclass
class _Pairs:
    """The pairs of a stream that are compared.

    Attributes
    ----------
    new : int64 array, shape (m,)
        The clusters that are compared with all others.
    row : int64 array, shape (n,)
        The row of each of them in ``costs``; -1 for the others.
    costs : array, shape (m, n)
        Of merging each of them with every other; infinite with itself.
    nearest : int64 array, shape (n,)
        Cached neighbour of each of the others, unless it is new; -1 elsewhere.
    edge : array, shape (n,)
        What merging with it costs; infinite elsewhere.
    """

    new: Integers
    row: Integers
    costs: Floats
    nearest: Integers
    edge: Floats


def _cached(clusters: Clusters, surplus: int) -> Integers:
    """Return cached neighbours; -1 for all where so few are new that all pairs are compared."""
    if clusters.nearest is None or int((clusters.nearest < 0).sum()) < 2 * surplus - 1:
        return np.full(clusters.counts.size, -1)
    nearest: Integers = clusters.nearest.astype(np.int64)
    return nearest


def _choose(
    clusters: Clusters, metric: Floats | None, value_scale: Any, surplus: int, space: _Space
) -> tuple[Integers, Integers, Integers]:
    """Choose disjoint pairs of a stream without free places, as `subgen.default.merging` does.

    Parameters
    ----------
    clusters, metric, value_scale
        Of one stream; see `subgen.default.merging.ward_costs`.
    surplus : int
        Most pairs.
    space : _Space
        Memory for the costs of the clusters that are compared with all others.

    Returns
    -------
    first, second : int64 array, shape (pairs,)
    nearest : int64 array, shape (n,)
        Of those in no pair, the nearest other in no pair; -1 where there is none.
    """
    n, dtype = clusters.counts.shape[0], clusters.keys.dtype
    weight = clusters.counts.astype(dtype)
    weight /= weight.sum()
    points = points_of(clusters.keys, clusters.values, weight @ clusters.keys, metric, value_scale)
    nearest = _cached(clusters, surplus)
    new = np.flatnonzero(nearest < 0)
    m = new.size
    costs = space.array(m, n)
    half = np.vecdot(points, points) * dtype.type(0.5)
    largest = float(np.finfo(dtype).max) ** 0.5
    # What may overflow, or has: costs are kept finite, so that any two clusters can merge.
    wild = not float(half.max()) < largest / 4
    w = clusters.importance
    some = bool((w > 0).all())
    loops = compiled("merge") if some and not wild else None
    # The product of a matrix and its own transpose: BLAS computes one half, and the result is exactly symmetric, as
    # mutual neighbours need.
    if m == n:
        np.matmul(points, points.T, out=costs)
    else:
        of_new = points.take(new, axis=0)
        np.matmul(of_new, points.T, out=costs)
        if loops is None:
            costs[:, new] = of_new @ of_new.T

    def finish(products: Floats, rows: Any, columns: Any, total: Floats, factor: Floats) -> None:
        """Turn products of points into costs, in place."""
        np.add(half[rows], half[columns], out=total)
        np.subtract(total, products, out=products)
        if wild:
            np.nan_to_num(products, copy=False, nan=0.0, posinf=largest, neginf=0.0)
            np.minimum(products, largest / 2, out=products)
        np.maximum(products, 0.0, out=products)
        np.multiply(w[rows], w[columns], out=factor)
        np.add(w[rows], w[columns], out=total)
        if not some:
            total[total <= 0] = 1.0
        factor /= total
        products *= factor

    if dtype == np.float32 and not wild and lossy(costs, new, half):
        precise = tree_map(lambda x: x.astype(np.float64) if x.dtype == dtype else x, clusters)
        precise_metric = None if metric is None else metric.astype(np.float64)
        return _choose(precise, precise_metric, np.float64(value_scale), surplus, _Space(np.dtype(np.float64)))

    # Pairs of unchanged clusters of which one is the cached neighbour of the other; a new one has its own row.
    keeps = nearest >= 0
    keeps[keeps] = nearest[nearest[keeps]] >= 0
    nearest[~keeps] = -1
    edge = np.full(n, np.inf, dtype)
    if loops is not None:
        loops.edges(points, half, w, nearest, edge)
        costs_bits, edge_bits = (x.view(np.int32 if dtype.itemsize == 4 else np.int64) for x in (costs, edge))
        chosen: tuple[Integers, Integers, Integers] = loops.choose(
            costs, costs_bits, new, half, w, nearest, edge_bits, surplus
        )
        return chosen
    old = np.flatnonzero(keeps)
    if old.size:
        # Some rows at a time: gathers of a megabyte wait for memory from the system.
        apart = np.empty(old.size, dtype)
        for start in range(0, old.size, _GATHERED):
            some_old = old[start : start + _GATHERED]
            others = points.take(nearest[some_old], axis=0)
            np.vecdot(points.take(some_old, axis=0), others, out=apart[start : start + _GATHERED])
        finish(apart, old, nearest[old], np.empty_like(apart), np.empty_like(apart))
        edge[old] = apart
    factors, totals = (np.empty((min(m, _ROWS), n), dtype) for _ in range(2))
    for start in range(0, m, _ROWS):
        part = slice(start, min(m, start + _ROWS))
        size = part.stop - start
        finish(costs[part], new[part, None], slice(None), totals[:size], factors[:size])
    costs[np.arange(m), new] = np.inf
    row = np.full(n, -1)
    row[new] = np.arange(m)
    return _match(_Pairs(new, row, costs, nearest, edge), surplus)


def lossy(products: Floats, new: Integers, half: Floats) -> bool:
    """Whether float32 has lost the digits of most nearest distances; see `subgen.default.merging.ward_costs`."""
    rows = np.arange(0, new.size, max(1, -(-new.size // SAMPLED)))
    sums = half[new[rows], None] + half
    near = sums - products[rows] < half.dtype.type(DIGITS) * sums
    near[np.arange(rows.size), new[rows]] = False
    return 2 * int(near.any(axis=1).sum()) > rows.size


def points_of(keys: Floats, values: Floats, centre: Floats, metric: Floats | None, value_scale: Any) -> Floats:
    """Points whose squared distances are those of keys in the metric and of values together.

    Differences are all that matters: without the common offset, ``centre``, float32 keeps the digits.
    """
    d = keys.shape[-1]
    points = np.empty((keys.shape[0], d + values.shape[-1]), keys.dtype)
    keys = keys - centre
    if metric is None:
        points[:, :d] = keys
    else:
        np.matmul(keys, _root(metric), out=points[:, :d])
    np.divide(values, value_scale, out=points[:, d:])
    return points


def _root(metric: Floats) -> Floats:
    """Return a matrix whose product with its transpose is the metric."""
    with np.errstate(all="ignore"):
        if np.isfinite(metric).all():
            try:
                lower: Floats = np.linalg.cholesky(metric)
                return lower
            except np.linalg.LinAlgError:  # on the edge of definite: float64 and eigenvalues, negative ones left out
                values, vectors = np.linalg.eigh(metric.astype(np.float64))
                root: Floats = (vectors * np.sqrt(np.maximum(values, 0.0))).astype(metric.dtype)
                return root
        # Beyond the dtype: any finite metric will do where all costs overflow.
        return np.eye(metric.shape[-1], dtype=metric.dtype)


def _look(pairs: _Pairs, who: Integers, taken: NDArray[np.bool_], partner: Integers, cost: Floats) -> None:
    """Look for the cheapest partner of some clusters, none of them taken, among those that are not taken."""
    costs, new, row, n = pairs.costs, pairs.new, pairs.row, pairs.edge.size
    is_new = row[who] >= 0
    rows, others = who[is_new], who[~is_new]
    penalty = np.where(taken, costs.dtype.type(np.inf), costs.dtype.type(0))
    # Some at a time: all of them would be copies of the costs.
    for some in chunks(rows.size, max(1, _LOOKED_AT // n)):
        looking = rows[some]
        part = costs[row[looking]]
        part += penalty
        partner[looking] = where = part.argmin(axis=1)
        cost[looking] = part[np.arange(looking.size), where]
    if not others.size:
        return
    partner[others], cost[others] = 0, np.inf
    for some in chunks(others.size if new.size else 0, max(1, _LOOKED_AT // max(1, new.size))):
        # With the columns as rows: what lies together is compared.
        looking = others[some]
        columns = np.ascontiguousarray((costs[:, looking] + penalty[new, None]).T)
        where = columns.argmin(axis=1)
        partner[looking], cost[looking] = new[where], columns[np.arange(looking.size), where]
    # Cached neighbours, in both directions: the cheapest, of equal ones the first, is written last.
    old = np.flatnonzero(~taken & (pairs.nearest >= 0))
    old = old[~taken[pairs.nearest[old]]]
    to, neighbour = np.concatenate([old, pairs.nearest[old]]), np.concatenate([pairs.nearest[old], old])
    price = np.concatenate([pairs.edge[old], pairs.edge[old]])
    order = np.lexsort((neighbour, price))[::-1]
    best, least = np.zeros(n, np.int64), np.full(n, np.inf, price.dtype)
    best[to[order]], least[to[order]] = neighbour[order], price[order]
    least, best, known = least[others], best[others], cost[others]
    closer = (least < known) | ((least == known) & (best < partner[others]))
    partner[others], cost[others] = np.where(closer, best, partner[others]), np.where(closer, least, known)


def _match(pairs: _Pairs, surplus: int) -> tuple[Integers, Integers, Integers]:
    """Choose rounds of mutual nearest, the cheapest first; see `_choose`."""
    n = pairs.edge.size
    index, taken = np.arange(n), np.zeros(n, bool)
    partner, cost = np.zeros(n, np.int64), np.empty(n, pairs.edge.dtype)
    _look(pairs, index, taken, partner, cost)
    firsts, seconds = [], []
    while True:
        first = np.flatnonzero((partner[partner] == index) & (index < partner) & (cost < np.inf))
        if surplus == 0 or first.size == 0:
            break
        if first.size > surplus:
            first = first[np.argsort(cost[first], kind="stable")[:surplus]]
        second = partner[first]
        firsts.append(first)
        seconds.append(second)
        surplus -= first.size
        for gone in (first, second):
            taken[gone] = True
            cost[gone] = np.inf
        # The nearest of all others is still there, and still their nearest.
        stale = np.flatnonzero(taken[partner] & (cost < np.inf))
        if stale.size:
            _look(pairs, stale, taken, partner, cost)
    return np.concatenate(firsts), np.concatenate(seconds), np.where(cost < np.inf, partner, -1)


def _renumbered(nearest: Any, stays: Integers, n: int) -> Any:
    """Give places among n as those among the ones that stay; -1 remains."""
    place = np.full(n + 1, -1, nearest.dtype)
    place[stays] = np.arange(stays.size)
    return place[nearest]


def _merge(clusters: Clusters, first: Integers, second: Integers, stays: Integers, to: Clusters | None) -> Clusters:
    """Merge pairs into the first of each, and keep only the clusters that stay; into ``to``, if it is given."""
    counts, added = clusters.counts[first], clusters.counts[second]
    wide = clusters.keys.dtype
    total = counts + added
    share = (added.astype(wide) / total.astype(wide))[:, None]
    difference = clusters.keys.take(second, axis=0) - clusters.keys.take(first, axis=0)
    apart = band_means(difference * difference)
    place = np.searchsorted(stays, first)
    if to is None:
        merged = tree_map(lambda x: x.take(stays, axis=0), clusters)
    else:
        merged = tree_map(lambda x, y: x.take(stays, axis=0, out=y[: stays.size], mode="clip"), clusters, to)
    merged.keys[place] += difference * share
    merged.values[place] += (clusters.values[second] - clusters.values[first]) * share
    merged.counts[place] = total
    # The parallel-axis rule.
    merged.key_variance[place] += share * (
        clusters.key_variance[second] - clusters.key_variance[first] + (1 - share) * apart
    )
    merged.importance[place] += clusters.importance[second]
    if merged.nearest is not None:
        merged.nearest[:] = _renumbered(merged.nearest, stays, clusters.counts.size)
    return merged
