"""The merges of `subgen_numpy.prompt`, compiled by numba: those of a block of tokens in one call.

Used where numba is installed, with the same results but for sums in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ._numba_merge import lossy, product
from ._numba_streams import OPTIONS, of_stream, subview

__all__ = ["lossy", "reduced", "summarize"]

# No number is NaN, and zeros have no sign: several are compared at once.
_compares = {"nnan", "nsz"}
# Columns that are written at once.
_TILE = 16


@njit(**OPTIONS)
def reduced(
    points: Any,
    half: Any,
    counts: Any,
    weights: Any,
    squared: Any,
    products: Any,
    max_clusters: int,
    all_nearest: Any,
    all_cost: Any,
    all_second: Any,
    all_price: Any,
    cost_bits: Any,
    price_bits: Any,
) -> Any:
    """Add the distances of new clusters, and merge until so many are left; see `subgen_numpy.prompt`.

    Parameters
    ----------
    points, half, counts, weights, squared, products, max_clusters
        As in `subgen_numpy.prompt`.
    all_nearest : int32 array, shape (places,)
        The cheapest partner of each of the clusters so far; -1 where it has merged. Written.
    all_cost : array, shape (places,)
        What merging with it costs; where it has merged, a bound of what merging with another costs. Written.
    all_second : array, shape (places,)
        A bound of what merging with any other than the cheapest costs. Written.
    all_price : array, shape (places,)
        Scratch memory.
    cost_bits, price_bits : array of integers, shape (places,)
        The last two as the integers that their bits are, in the same order as none is negative: the least integer of
        many is found many at once, the least floating number is not.
    """
    size, n = products.shape
    held, dtype = n - size, points.dtype
    one, infinite = dtype.type(1), dtype.type(np.inf)
    nearest, cost, second = subview(all_nearest, 0, n), subview(all_cost, 0, n), subview(all_second, 0, n)
    cost_bits, price_bits = subview(cost_bits, 0, n), subview(price_bits, 0, n)
    inverse, penalty, price = np.empty(n, dtype), np.zeros(n, dtype), subview(all_price, 0, n)
    for i in range(n):
        inverse[i] = one / weights[i]
    _fill(half, squared, products)
    for i in range(held, n):
        row = subview(of_stream(squared, i), 0, n)
        _compare(row, i, inverse, penalty, price, held, i, i, nearest, cost, second)
        _search(i, price, price_bits, nearest, cost, second)
    root, place = np.arange(n), np.arange(n)
    for _ in range(n - max_clusters):
        i = _least(cost_bits)
        while nearest[i] < 0:
            row = subview(of_stream(squared, i), 0, n)
            _compare(row, i, inverse, penalty, price, 0, i, i, nearest, cost, second)
            _search(i, price, price_bits, nearest, cost, second)
            i = _least(cost_bits)
        j = np.int64(nearest[i])
        total = counts[i] + counts[j]
        share = one - counts[i] / total
        within = share * (one - share) * squared[i, j]
        row = subview(of_stream(squared, i), 0, n)
        _join(row, subview(of_stream(squared, j), 0, n), share, within)
        row[i] = infinite
        for k in range(n):
            squared[k, i] = row[k]
        for t in range(points.shape[1]):
            points[i, t] += (points[j, t] - points[i, t]) * share
        counts[i] = total
        weights[i] += weights[j]
        inverse[i] = one / weights[i]
        penalty[j] = cost[j] = second[j] = infinite
        place[j] = i
        _compare(row, i, inverse, penalty, price, n, i, j, nearest, cost, second)
        _search(i, price, price_bits, nearest, cost, second)
    # A place that is free points to one that came before it merged; those it merged into follow.
    for k in range(n):
        while place[root[k]] != root[k]:
            root[k] = place[root[k]]
    if n > max_clusters:
        _close_up(points, half, counts, weights, squared, penalty, place, nearest, cost, second)
        for k in range(n):
            root[k] = place[root[k]]
    return root


@njit(**OPTIONS)
def summarize(
    keys: Any,
    values: Any,
    weights: Any,
    labels: Any,
    mean_keys: Any,
    mean_values: Any,
    counts: Any,
    variance: Any,
    importance: Any,
) -> None:
    """Describe the clusters of a stream; see `subgen.default.prompt.summarize`. The last five are written."""
    n, dim = keys.shape
    bands = variance.shape[1]
    width, one = dim // bands, keys.dtype.type(1)
    mean_keys[:], mean_values[:], counts[:], variance[:], importance[:] = 0, 0, 0, 0, 0
    for i in range(n):
        c = labels[i]
        counts[c] += 1
        importance[c] += weights[i]
        mean, given = of_stream(mean_keys, c), of_stream(keys, i)
        for t in range(dim):
            mean[t] += given[t]
        mean, given = of_stream(mean_values, c), of_stream(values, i)
        for t in range(values.shape[1]):
            mean[t] += given[t]
    for c in range(counts.size):
        share = one / counts[c]
        for t in range(dim):
            mean_keys[c, t] *= share
        for t in range(values.shape[1]):
            mean_values[c, t] *= share
    for i in range(n):
        c = labels[i]
        if counts[c] > 1:
            mean, given = of_stream(mean_keys, c), of_stream(keys, i)
            for b in range(bands):
                whole = keys.dtype.type(0)
                for t in range(b * width, (b + 1) * width):
                    apart = given[t] - mean[t]
                    whole += apart * apart
                variance[c, b] += whole / (keys.dtype.type(counts[c]) * width)


@njit(**OPTIONS)
def _fill(half: Any, squared: Any, products: Any) -> None:
    """Turn products into the squared distances of the new from all; both halves."""
    size, n = products.shape
    held, dtype = n - size, half.dtype
    two, zero = dtype.type(2), dtype.type(0)
    for r in range(size):
        row, given = of_stream(squared, held + r), of_stream(products, r)
        own = half[held + r]
        for k in range(n):
            row[k] = max(two * (own + half[k] - given[k]), zero)
    for r in range(size):
        for q in range(r):
            middle = (squared[held + r, held + q] + squared[held + q, held + r]) * dtype.type(0.5)
            squared[held + r, held + q] = squared[held + q, held + r] = middle
        squared[held + r, held + r] = np.inf
    for start in range(0, held, _TILE):
        for r in range(size):
            for k in range(start, min(held, start + _TILE)):
                squared[k, held + r] = squared[held + r, k]


@njit(fastmath=_compares, **OPTIONS)
def _join(row: Any, other: Any, share: Any, within: Any) -> None:
    """Turn the distances of one of two clusters into those of their mean."""
    rest, zero = row.dtype.type(1) - share, row.dtype.type(0)
    for k in range(row.size):
        row[k] = max(rest * row[k] + share * other[k] - within, zero)


@njit(fastmath=_compares, **OPTIONS)
def _compare(
    row: Any,
    who: int,
    inverse: Any,
    penalty: Any,
    price: Any,
    offered: int,
    i: int,
    j: int,
    nearest: Any,
    cost: Any,
    second: Any,
) -> None:
    """Compute what merging with a cluster costs, and offer it to the first clusters.

    Those whose nearest is one of two that have merged no longer have one.
    """
    own, me = inverse[who], np.int32(who)
    one, other, none = np.int32(i), np.int32(j), np.int32(-1)
    for k in range(row.size):
        price[k] = row[k] / (own + inverse[k]) + penalty[k]
    for k in range(offered):
        gone = (nearest[k] == one) | (nearest[k] == other)
        near, least = none if gone else nearest[k], second[k] if gone else cost[k]
        closer = (price[k] < least) | ((price[k] == least) & (me < near))
        nearest[k] = me if closer else near
        cost[k] = price[k] if closer else least
        # Of one that has no nearest, both are the same bound.
        second[k] = least if closer else min(second[k], price[k])


@njit(**OPTIONS)
def _search(i: int, price: Any, price_bits: Any, nearest: Any, cost: Any, second: Any) -> None:
    """Find the nearest of a cluster and the second least cost, from what merging with each costs: written over."""
    near = _least(price_bits)
    nearest[i], cost[i] = near, price[near]
    price[near] = np.inf
    second[i] = price[_least(price_bits)]


@njit(**OPTIONS)
def _least(bits: Any) -> Any:
    """Find the first of the least: a pass for the least, and one for its place."""
    least = bits[0]
    for k in range(1, bits.size):
        least = min(least, bits[k])
    where = np.int32(bits.size)
    for k in range(bits.size):
        where = min(where, np.int32(k) if bits[k] == least else np.int32(bits.size))
    return where


@njit(**OPTIONS)
def _close_up(
    points: Any,
    half: Any,
    counts: Any,
    weights: Any,
    squared: Any,
    penalty: Any,
    place: Any,
    nearest: Any,
    cost: Any,
    second: Any,
) -> None:
    """Put the clusters that are left first, in their order, and write the new place of each."""
    left = np.flatnonzero(penalty == 0)
    for m in range(left.size):
        place[left[m]] = m
    for m in range(left.size):
        i = left[m]
        counts[m], weights[m], cost[m], second[m] = counts[i], weights[i], cost[i], second[i]
        near = nearest[i]
        nearest[m] = place[near] if near >= 0 and penalty[near] == 0 else -1
        if m < i:
            for t in range(points.shape[1]):
                points[m, t] = points[i, t]
        half[m] = product(points, m, points, m, points.shape[1]) * half.dtype.type(0.5)
        to, row = of_stream(squared, m), of_stream(squared, i)
        for k in range(left.size):
            to[k] = row[left[k]]
