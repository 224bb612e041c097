"""The loops over pairs compiled by numba: costs in one pass over their products, and the search for pairs.

Used where numba is installed. Numbers are computed as in `subgen_numpy.merging`, but for the products of two that
are cached neighbours, which are added up in another order.

Costs are compared as the integers that their bits are, in the same order as none is negative: the least integer of many
is found many at once, the least floating number is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from subgen.default.merging import DIGITS, SAMPLED

from ._numba_streams import OPTIONS, SUMS, of_stream, subview

__all__ = ["choose", "edges", "lossy", "product"]

Integers = NDArray[np.int64]

# Neighbours for which the cheapest partner of a new cluster is cached.
_SPAN = 128
# No number is NaN, and zeros have no sign: several are compared at once.
_compares = {"nnan", "nsz"}


@njit(**OPTIONS)
def edges(points: Any, half: Any, weight: Any, nearest: Any, edge: Any) -> None:
    """Compute the cost of merging each with its cached neighbour, without gathering either.

    Parameters
    ----------
    points, half, weight
        Of all clusters; see `choose`.
    nearest : int64 array, shape (n,)
        Cached neighbour of each; -1 where there is none.
    edge : array, shape (n,)
        Written; infinite where there is no neighbour.
    """
    zero, infinite = half.dtype.type(0), half.dtype.type(np.inf)
    for i in range(nearest.size):
        j = nearest[i]
        edge[i] = infinite
        if j >= 0:
            apart = max(half[i] + half[j] - product(points, i, points, j, points.shape[1]), zero)
            edge[i] = apart * (weight[i] * weight[j] / (weight[i] + weight[j]))


@njit(**OPTIONS)
def lossy(products: Any, new: Any, half: Any) -> bool:
    """Whether float32 has lost the digits of most nearest distances; see `subgen.default.merging.ward_costs`."""
    if half.itemsize > 4:
        return False
    lost, counted, digits = 0, 0, half.dtype.type(DIGITS)
    for r in range(0, new.size, max(1, -(-new.size // SAMPLED))):
        counted += 1
        own = half[new[r]]
        for j in range(half.size):
            if own + half[j] - products[r, j] < digits * (own + half[j]) and j != new[r]:
                lost += 1
                break
    return 2 * lost > counted


@njit(fastmath=SUMS, **OPTIONS)
def product(x: Any, i: int, y: Any, j: int, size: int) -> Any:
    """Inner product of the first numbers of a row of one and a row of the other, summed in any order."""
    whole = x.dtype.type(0)
    for t in range(size):
        whole += x[i, t] * y[j, t]
    return whole


@njit(**OPTIONS)
def choose(
    costs: Any, bits: Any, new: Any, half: Any, weight: Any, nearest: Any, edge: Any, surplus: int
) -> tuple[Integers, Integers, Integers]:
    """Choose disjoint pairs: rounds of mutual nearest, the cheapest first; see `subgen.default.merging`.

    A cluster whose partner was taken is *stale*. A new one looks for another at once. An old one, of which there are
    more, does so when it may be one of a mutual pair: when another that is not stale has it for a partner, or one that
    is stale is its cached neighbour, or has it for one. All others need none before the end.

    Parameters
    ----------
    costs : array, shape (m, n)
        Products of each new point and every point, none of them NaN; written over.
    bits : array of integers, shape (m, n)
        The same memory.
    new, nearest
        See `subgen_numpy.merging._Pairs`.
    half : array, shape (n,)
        Half of the square of each point.
    weight : array, shape (n,)
        Importance, positive.
    edge : array of integers, shape (n,)
        The bits of what is so called there.
    surplus : int
        Most pairs.

    Returns
    -------
    first, second : int64 array, shape (pairs,)
    nearest : int64 array, shape (n,)
        Of those in no pair, the nearest other in no pair; -1 where there is none.
    """
    m, n = costs.shape
    everyone = m == n
    # The row of each new one in the costs; of the others -1, -2, ...: their rows in the transposed costs.
    row, olds = np.zeros(n, np.int64), 0
    row[new] = np.arange(1, m + 1)
    for i in range(n):
        if row[i] == 0:
            olds += 1
            row[i] = -olds
        else:
            row[i] -= 1
    spans = -(-n // _SPAN)
    # Of each, the cheapest of the new ones; where all are new, in each span. Costs are symmetric.
    offered = np.zeros((spans if everyone else 1, n), np.int32)
    least_offered = np.full(offered.shape, np.inf, costs.dtype)
    infinite = least_offered.view(edge.dtype)[0, 0]
    if not everyone:
        _mirror(costs, new)
    _fill(costs, new, half, weight, offered, least_offered)
    partner, cost = offered[0].copy(), least_offered[0].view(edge.dtype).copy()
    # What those that are taken cost, at least.
    penalty, new_penalty = np.zeros(n, edge.dtype), np.zeros(m, edge.dtype)
    # Of each new one, the cheapest in each span and its cost; of the others, all costs together.
    turned = np.empty((olds, m), edge.dtype)
    if everyone:
        place, least = offered.T.copy(), least_offered.view(edge.dtype).T.copy()
    else:
        place, least = np.empty((m, spans), np.int32), np.empty((m, spans), edge.dtype)
        for r in range(m):
            for span in range(spans):
                _search(bits, penalty, place, least, r, span)
        _turn(bits, row, turned)
    for r in range(m):
        partner[new[r]], cost[new[r]] = _cheapest(bits, penalty, place, least, r, infinite)
    # Of clusters with the same cached neighbour, the last, and the one before each.
    last, prev = np.full(n, -1), np.full(n, -1)
    for i in range(n):
        if nearest[i] >= 0:
            _offer(i, nearest[i], edge[i], partner, cost)
            _offer(nearest[i], i, edge[i], partner, cost)
            prev[i], last[nearest[i]] = last[nearest[i]], i
    stale = np.zeros(n, np.bool_)
    first = np.empty(min(surplus, n // 2), np.int64)
    second, found = np.empty_like(first), np.empty(n, np.int64)
    pairs = 0
    while True:
        looking = True
        while looking:
            looking = False
            for i in range(n):
                j = np.int64(partner[i])
                if cost[i] == infinite:
                    continue
                if stale[i]:
                    j = nearest[i]
                    if j < 0 or not stale[j]:
                        continue
                    looking = True
                    _look(i, turned, row, new, new_penalty, nearest, edge, penalty, last, prev, partner, cost, infinite)
                    stale[i] = False
                if stale[j]:
                    looking = True
                    _look(j, turned, row, new, new_penalty, nearest, edge, penalty, last, prev, partner, cost, infinite)
                    stale[j] = False
        mutual = 0
        for i in range(n):
            j = np.int64(partner[i])
            if i < j and partner[j] == i and cost[i] < infinite and not stale[i] and not stale[j]:
                found[mutual] = i
                mutual += 1
        if mutual == 0 or pairs == surplus:
            break
        chosen = found[:mutual]
        if mutual > surplus - pairs:
            chosen = chosen[np.argsort(cost[chosen], kind="mergesort")[: surplus - pairs]]
        for i in chosen:
            first[pairs], second[pairs] = i, partner[i]
            pairs += 1
            for gone in (i, np.int64(partner[i])):
                cost[gone] = penalty[gone] = infinite
                if row[gone] >= 0:
                    new_penalty[row[gone]] = infinite
        for i in range(n):
            if cost[i] < infinite and penalty[partner[i]] > 0:
                if row[i] >= 0:
                    partner[i], cost[i] = _cheapest(bits, penalty, place, least, row[i], infinite)
                else:
                    stale[i] = True
    left = np.empty(n, np.int64)
    for i in range(n):
        if stale[i]:
            _look(i, turned, row, new, new_penalty, nearest, edge, penalty, last, prev, partner, cost, infinite)
        left[i] = partner[i] if cost[i] < infinite else -1
    return first[:pairs], second[:pairs], left


@njit(**OPTIONS)
def _mirror(products: Any, new: Any) -> None:
    """Make products of new ones with each other symmetric, as mutual neighbours need."""
    for r in range(new.size):
        for before in range(r):
            products[before, new[r]] = products[r, new[before]]


@njit(fastmath=_compares, **OPTIONS)
def _fill(costs: Any, new: Any, half: Any, weight: Any, offered: Any, least_offered: Any) -> None:
    """Turn products into costs, and give every cluster the cheapest of the new ones, or of each span of them."""
    m, n = costs.shape
    every = m if offered.shape[0] == 1 else _SPAN
    zero, infinite = half.dtype.type(0), half.dtype.type(np.inf)
    for r in range(m):
        row, i = costs[r], np.int32(new[r])
        own, own_weight = half[i], weight[i]
        for j in range(n):
            apart = max(own + half[j] - row[j], zero)
            row[j] = apart * (own_weight * weight[j] / (own_weight + weight[j]))
        row[i] = infinite
        # A row offers itself to every column, which takes no search.
        partner, cost = offered[r // every], least_offered[r // every]
        for j in range(n):
            closer = row[j] < cost[j]
            cost[j] = row[j] if closer else cost[j]
            partner[j] = i if closer else partner[j]


@njit(**OPTIONS)
def _turn(x: Any, row: Any, turned: Any) -> None:
    """Transpose the columns of clusters that are not new, in tiles that fit the cache."""
    m, n = x.shape
    for start in range(0, n, 16):
        for r in range(m):
            for j in range(start, min(n, start + 16)):
                if row[j] < 0:
                    turned[-1 - row[j], r] = x[r, j]


@njit(**OPTIONS)
def _offer(to: int, who: int, price: Any, partner: Any, cost: Any) -> None:
    """Take a partner if it is cheaper, or of equal ones the first."""
    if price < cost[to] or (price == cost[to] and who < partner[to]):
        partner[to], cost[to] = who, price


@njit(**OPTIONS)
def _least(prices: Any, penalty: Any) -> Any:
    """Find the first of the least, and it: a pass for the least, and one for its place."""
    least = max(prices[0], penalty[0])
    for j in range(1, prices.size):
        least = min(least, max(prices[j], penalty[j]))
    place = np.int32(prices.size)
    for j in range(prices.size):
        here = np.int32(j) if max(prices[j], penalty[j]) == least else np.int32(prices.size)
        place = min(place, here)
    return place, least


@njit(**OPTIONS)
def _search(costs: Any, penalty: Any, place: Any, least: Any, r: int, span: int) -> None:
    """Look for the cheapest in a span."""
    start = span * _SPAN
    end = min(costs.shape[1], start + _SPAN)
    where, least[r, span] = _least(subview(of_stream(costs, r), start, end), subview(penalty, start, end))
    place[r, span] = start + where


@njit(**OPTIONS)
def _cheapest(costs: Any, penalty: Any, place: Any, least: Any, r: int, infinite: Any) -> Any:
    """Find the cheapest partner of a new cluster that is not taken, and its cost.

    A span whose cheapest has gone holds none that is cheaper: it is searched when it is the cheapest of all.
    """
    while True:
        span = 0
        for other in range(1, least.shape[1]):
            if least[r, other] < least[r, span]:
                span = other
        if least[r, span] == infinite or penalty[place[r, span]] == 0:
            return place[r, span], least[r, span]
        _search(costs, penalty, place, least, r, span)


@njit(**OPTIONS)
def _look(
    i: int,
    turned: Any,
    row: Any,
    new: Any,
    new_penalty: Any,
    nearest: Any,
    edge: Any,
    penalty: Any,
    last: Any,
    prev: Any,
    partner: Any,
    cost: Any,
    infinite: Any,
) -> None:
    """Look for the cheapest partner of an old cluster that is not taken: a new one, or by the cached neighbours."""
    partner[i], cost[i] = 0, infinite
    if new.size:
        which, cost[i] = _least(of_stream(turned, -1 - row[i]), new_penalty)
        partner[i] = new[which]
    if nearest[i] >= 0 and penalty[nearest[i]] == 0:
        _offer(i, nearest[i], edge[i], partner, cost)
    j = last[i]
    while j >= 0:
        if penalty[j] == 0:
            _offer(i, j, edge[j], partner, cost)
        j = prev[j]
