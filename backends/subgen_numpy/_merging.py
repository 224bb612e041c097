"""Merging closest pairs: a stream at a time, so that the costs of its pairs stay in the cache.

The same pairs as `subgen.merging`, with less work: one symmetric product gives all costs, they are written over it,
each row's cheapest partner is looked for once, and only the pairs that merge are touched. Where numba is installed, the
loops over pairs are compiled, with the same results to the last bit.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen.merging import Means, band_means

__all__ = ["merge_closest"]

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]

# Rows of costs worked on at once: with their factors they fit a cache of half a megabyte.
_ROWS = 48
# Neighbours among which the cheapest partner of a cluster is remembered.
_SPAN = 64


def merge_closest(
    means: Means, metric: Floats | None, value_scale: Floats, most: int, places: int
) -> tuple[Means, Integers]:
    """Merge closest pairs until at most a number of clusters is left; see `subgen.merging.merge_closest`."""
    streams, n = means.counts.shape
    places = min(places, n)
    result = means.each(lambda x: np.empty((streams, places, *x.shape[2:]), x.dtype))
    moved = np.empty((streams, n), np.int64)
    room: Floats = np.empty(0, means.keys.dtype)
    for stream in range(streams):
        own = means.each(lambda x, stream=stream: x[stream])  # type: ignore[misc]
        left = np.flatnonzero(own.counts > 0)
        root = np.arange(n)  # the cluster that each became part of
        found = own if left.size == n else own.each(lambda x, left=left: x[left])  # type: ignore[misc]
        while left.size > most:
            size = left.size * _spans(left.size) * _SPAN
            if room.size < size:
                room = np.empty(size, means.keys.dtype)
            nearest = _nearest(
                found, None if metric is None else metric[stream % metric.shape[0]], value_scale[stream], room
            )
            first, second = _match(nearest, left.size - most)
            stays = np.ones(left.size, bool)
            stays[second] = False
            step = np.arange(n)
            step[left[second]] = left[first]
            root = step[root]
            found, left = _merge(found, first, second, np.flatnonzero(stays)), left[stays]
        # Clusters first, in their order; free places hold zeros.
        free = np.ones(n, bool)
        free[left] = False
        place = np.empty(n, np.int64)
        place[left], place[free] = np.arange(left.size), np.arange(left.size, n)
        moved[stream] = place[root]
        for to, x in zip(result.arrays(), found.arrays(), strict=True):
            if to is not None:
                to[stream, : left.size] = x
                to[stream, left.size :] = 0
    return result, moved


@cache
def compiled() -> ModuleType | None:
    """Return the compiled loops, or None where numba is missing, too old or new for NumPy, or has no place to cache."""
    try:
        return importlib.import_module("subgen_numpy._compiled")
    except (ImportError, RuntimeError):
        return None


@dataclass
class _Nearest:
    """The costs of all pairs of a stream, and the cheapest partner of each in each span of neighbours.

    Attributes
    ----------
    costs : array, shape (n, spans, _SPAN)
        Infinite where there is no cluster.
    place, least : integer array and array, shape (n, spans)
        Place of the cheapest within the span, and its cost.
    """

    costs: Floats
    place: NDArray[np.integer[Any]]
    least: Floats


def _nearest(means: Means, metric: Floats | None, value_scale: Any, room: Floats) -> _Nearest:
    """Half of `subgen.merging.ward_costs` of a stream without free places, in the room given."""
    n = means.counts.shape[0]
    spans = _spans(n)
    dtype = means.keys.dtype
    points = _points(means, metric, value_scale)
    costs = room[: n * spans * _SPAN].reshape(n, spans, _SPAN)
    pairs = costs.reshape(n, -1)[:, :n]
    # The product of a matrix and its own transpose: BLAS computes one half, and the result is exactly symmetric.
    np.matmul(points, points.T, out=pairs)
    costs.reshape(n, -1)[:, n:] = np.inf
    half = pairs.diagonal() * dtype.type(0.5)
    largest = float(np.finfo(dtype).max) ** 0.5
    # What may overflow, or has: costs are kept finite, so that any two clusters can merge.
    wild = not float(half.max()) < largest / 4
    w = means.importance
    some = bool((w > 0).all())
    loops = compiled()
    if loops is not None and some and not wild:
        place, least = np.empty((spans, n), np.int32), np.empty((spans, n), dtype)
        loops.costs_and_nearest(costs, half, w, place, least)
        return _Nearest(costs, np.ascontiguousarray(place.T), np.ascontiguousarray(least.T))
    places, factors, totals = np.empty((n, spans), np.intp), *(np.empty((min(n, _ROWS), n), dtype) for _ in range(2))
    for start in range(0, n, _ROWS):
        part = slice(start, min(n, start + _ROWS))
        block = pairs[part]
        factor, total = factors[: block.shape[0]], totals[: block.shape[0]]
        np.add(half[part, None], half, out=total)
        np.subtract(total, block, out=block)
        if wild:
            np.nan_to_num(block, copy=False, nan=0.0, posinf=largest, neginf=0.0)
            np.minimum(block, largest / 2, out=block)
        np.maximum(block, 0.0, out=block)
        np.multiply(w[part, None], w, out=factor)
        np.add(w[part, None], w, out=total)
        if not some:
            total[total <= 0] = 1.0
        factor /= total
        block *= factor
        np.fill_diagonal(block[:, start:], np.inf)
        costs[part].argmin(axis=-1, out=places[part])
    return _Nearest(costs, places, np.take_along_axis(costs, places[:, :, None], axis=2)[:, :, 0])


def _points(means: Means, metric: Floats | None, value_scale: Any) -> Floats:
    """Points whose squared distances are those of keys in the metric and of values together."""
    dtype, d = means.keys.dtype, means.keys.shape[-1]
    points = np.empty((means.keys.shape[0], d + means.values.shape[-1]), dtype)
    weight = means.counts.astype(dtype)
    weight /= weight.sum()
    # Differences are all that matters: without the common offset, float32 keeps the digits.
    keys = means.keys - weight @ means.keys
    if metric is None:
        points[:, :d] = keys
    else:
        np.matmul(keys, _root(metric), out=points[:, :d])
    np.divide(means.values, value_scale, out=points[:, d:])
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


def _match(nearest: _Nearest, surplus: int) -> tuple[Integers, Integers]:
    """Choose disjoint pairs, as `subgen.merging` does: rounds of mutual nearest, the cheapest first."""
    costs, place, least = nearest.costs, nearest.place, nearest.least
    loops = compiled()
    if loops is not None:
        pairs: tuple[Integers, Integers] = loops.match(costs, place, least, surplus)
        return pairs
    n, spans, _ = costs.shape
    index = np.arange(n)
    span = least.argmin(axis=-1)
    partner, cost = span * _SPAN + place[index, span], least[index, span]
    taken, penalty = np.zeros(n, bool), np.zeros((spans, _SPAN), costs.dtype)
    firsts, seconds = [], []
    while surplus > 0:
        first = np.flatnonzero((partner[partner] == index) & (index < partner) & (cost < np.inf))
        if first.size == 0:
            break
        if first.size > surplus:
            first = first[np.argsort(cost[first], kind="stable")[:surplus]]
        second = partner[first]
        firsts.append(first)
        seconds.append(second)
        surplus -= first.size
        if surplus <= 0:
            break
        for gone in (first, second):
            taken[gone] = True
            cost[gone] = penalty.reshape(-1)[gone] = np.inf
        # The nearest of all others is still there, and still their nearest. Only its span is searched again: a span
        # whose cheapest has gone holds none that is cheaper.
        stale = np.flatnonzero(taken[partner] & ~taken)
        while stale.size:
            span = partner[stale] // _SPAN
            rows = costs[stale, span]
            rows += penalty[span]
            place[stale, span] = where = rows.argmin(axis=-1)
            least[stale, span] = rows[np.arange(stale.size), where]
            span = least[stale].argmin(axis=-1)
            partner[stale], cost[stale] = span * _SPAN + place[stale, span], least[stale, span]
            stale = stale[taken[partner[stale]] & (cost[stale] < np.inf)]
    return np.concatenate(firsts), np.concatenate(seconds)


def _spans(n: int) -> int:
    return -(-n // _SPAN)


def _merge(means: Means, first: Integers, second: Integers, stays: Integers) -> Means:
    """Merge pairs into the first of each, and keep only the clusters that stay."""
    counts, added = means.counts[first], means.counts[second]
    wide = means.keys.dtype
    total = counts + added
    share = (added.astype(wide) / total.astype(wide))[:, None]
    difference = means.keys[second] - means.keys[first]
    apart = band_means(difference * difference)
    place = np.searchsorted(stays, first)
    merged = means.each(lambda x: x[stays])
    merged.keys[place] += difference * share
    merged.values[place] += (means.values[second] - means.values[first]) * share
    merged.counts[place] = total
    # The parallel-axis rule.
    merged.spread[place] += share * (means.spread[second] - means.spread[first] + (1 - share) * apart)
    merged.importance[place] += means.importance[second]
    return merged
