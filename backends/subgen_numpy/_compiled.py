"""The loops over pairs compiled by numba: costs in one pass over their products, and the search for pairs.

Used where numba is installed. Every number is computed as in `subgen_numpy._merging`, so the results are the same to
the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["choose"]

Integers = NDArray[np.int64]

# Neighbours among which the cheapest partner of a new cluster is remembered.
_SPAN = 128
_options = {"cache": True, "nogil": True, "error_model": "numpy"}
# No number is NaN, and zeros have no sign: several are compared at once.
_compares = {"nnan", "nsz"}


@njit(**_options)
def choose(
    costs: Any, new: Any, half: Any, weight: Any, nearest: Any, edge: Any, surplus: int
) -> tuple[Integers, Integers, Integers]:
    """Choose disjoint pairs: rounds of mutual nearest, the cheapest first; see `subgen.merging`.

    A cluster whose partner was taken is *stale*. A new one looks for another at once. An old one, of which there are
    more, does so when it may be one of a mutual pair: when another that is not stale has it for a partner, or one that
    is stale remembers it or is remembered by it. All others need none before the end.

    Parameters
    ----------
    costs : array, shape (m, n)
        Products of each new point and every point, none of them NaN; written over.
    new, nearest, edge
        See `subgen_numpy._merging._Pairs`.
    half : array, shape (n,)
        Half of the square of each point.
    weight : array, shape (n,)
        Importance, positive.
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
    row = np.full(n, -1)
    row[new] = np.arange(m)
    spans = -(-n // _SPAN)
    penalty, penalty_of_new = np.zeros(n, costs.dtype), np.zeros(m, costs.dtype)
    # Of each, the cheapest of the new ones; where all are new, in each span. Costs are symmetric.
    offered = np.zeros((spans if everyone else 1, n), np.int32)
    least_offered = np.full(offered.shape, np.inf, costs.dtype)
    _fill(costs, new, half, weight, offered, least_offered)
    partner, cost = offered[0].copy(), least_offered[0].copy()
    # Of each new one, the cheapest in each span and its cost; of the others, all costs together.
    turned = np.empty((0 if everyone else n, m), costs.dtype)
    if everyone:
        place, least = offered.T.copy(), least_offered.T.copy()
    else:
        place, least = np.empty((m, spans), np.int32), np.empty((m, spans), costs.dtype)
        for r in range(m):
            for span in range(spans):
                _search(costs[r], penalty, place[r], least[r], span)
        _turn(costs, turned)
    for r in range(m):
        partner[new[r]], cost[new[r]] = _cheapest(costs[r], penalty, place[r], least[r])
    # Of those that remember the same cluster, the last, and the one before each.
    last, before = np.full(n, -1), np.full(n, -1)
    for i in range(n):
        if nearest[i] >= 0:
            _offer(i, nearest[i], edge[i], partner, cost)
            _offer(nearest[i], i, edge[i], partner, cost)
            before[i], last[nearest[i]] = last[nearest[i]], i
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
                if cost[i] == np.inf:
                    continue
                if stale[i]:
                    j = nearest[i]
                    if j < 0 or not stale[j]:
                        continue
                    looking = True
                    _look(i, turned, new, penalty_of_new, nearest, edge, penalty, last, before, partner, cost)
                    stale[i] = False
                if stale[j]:
                    looking = True
                    _look(j, turned, new, penalty_of_new, nearest, edge, penalty, last, before, partner, cost)
                    stale[j] = False
        mutual = 0
        for i in range(n):
            j = np.int64(partner[i])
            if i < j and partner[j] == i and cost[i] < np.inf and not stale[i] and not stale[j]:
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
                cost[gone] = penalty[gone] = np.inf
                if row[gone] >= 0:
                    penalty_of_new[row[gone]] = np.inf
        for i in range(n):
            if cost[i] < np.inf and penalty[partner[i]] > 0:
                if row[i] >= 0:
                    partner[i], cost[i] = _cheapest(costs[row[i]], penalty, place[row[i]], least[row[i]])
                else:
                    stale[i] = True
    left = np.empty(n, np.int64)
    for i in range(n):
        if stale[i]:
            _look(i, turned, new, penalty_of_new, nearest, edge, penalty, last, before, partner, cost)
        left[i] = partner[i] if cost[i] < np.inf else -1
    return first[:pairs], second[:pairs], left


@njit(fastmath=_compares, **_options)
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


@njit(**_options)
def _turn(x: Any, turned: Any) -> None:
    """Transpose, in tiles that fit the cache."""
    m, n = x.shape
    for start in range(0, n, 16):
        for r in range(m):
            for j in range(start, min(n, start + 16)):
                turned[j, r] = x[r, j]


@njit(**_options)
def _offer(to: int, who: int, price: Any, partner: Any, cost: Any) -> None:
    """Take a partner if it is cheaper, or of equal ones the first."""
    if price < cost[to] or (price == cost[to] and who < partner[to]):
        partner[to], cost[to] = who, price


@njit(fastmath=_compares, **_options)
def _least(prices: Any, penalty: Any) -> Any:
    """Find the first of the least sums, and it: two passes, which compare several at once."""
    least = prices.dtype.type(np.inf)
    for j in range(prices.size):
        price = prices[j] + penalty[j]
        least = price if price < least else least
    where = 0
    while where < prices.size - 1 and prices[where] + penalty[where] != least:
        where += 1
    return where, least


@njit(**_options)
def _search(costs: Any, penalty: Any, place: Any, least: Any, span: int) -> None:
    """Look for the cheapest in a span."""
    start = span * _SPAN
    end = min(costs.size, start + _SPAN)
    where, least[span] = _least(costs[start:end], penalty[start:end])
    place[span] = start + where


@njit(**_options)
def _cheapest(costs: Any, penalty: Any, place: Any, least: Any) -> Any:
    """Find the cheapest partner of a new cluster that is not taken, and its cost.

    A span whose cheapest has gone holds none that is cheaper: it is searched when it is the cheapest of all.
    """
    while True:
        span = 0
        for other in range(1, least.size):
            if least[other] < least[span]:
                span = other
        if least[span] == np.inf or penalty[place[span]] == 0:
            return place[span], least[span]
        _search(costs, penalty, place, least, span)


@njit(**_options)
def _look(
    i: int,
    turned: Any,
    new: Any,
    penalty_of_new: Any,
    nearest: Any,
    edge: Any,
    penalty: Any,
    last: Any,
    before: Any,
    partner: Any,
    cost: Any,
) -> None:
    """Look for the cheapest partner of an old cluster that is not taken: a new one, or of those that remember."""
    partner[i], cost[i] = 0, np.inf
    if new.size:
        which, cost[i] = _least(turned[i], penalty_of_new)
        partner[i] = new[which]
    if nearest[i] >= 0 and penalty[nearest[i]] == 0:
        _offer(i, nearest[i], edge[i], partner, cost)
    j = last[i]
    while j >= 0:
        if penalty[j] == 0:
            _offer(i, j, edge[j], partner, cost)
        j = before[j]
