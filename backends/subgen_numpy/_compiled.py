"""Two loops of merging compiled by numba: the costs of all pairs in one pass over them, and the search for pairs.

Used where numba is installed. Every number is computed as in `subgen_numpy._merging`, so the results are the same to
the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["costs_and_nearest", "match"]

Integers = NDArray[np.int64]

_options = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(fastmath={"nnan", "nsz"}, **_options)
def costs_and_nearest(costs: Any, half: Any, weight: Any, place: Any, least: Any) -> None:
    """Turn products of points into costs of merging, and find the cheapest partner of each in each span.

    Parameters
    ----------
    costs : array, shape (n, spans, size)
        Products of each two points, neither of them NaN; written over.
    half : array, shape (n,)
        Half of the square of each point.
    weight : array, shape (n,)
        Importance, positive.
    place, least : int32 array and array, shape (spans, n)
        The cheapest partner of each point in each span, and its cost; written to.
    """
    n, size = half.size, costs.shape[2]
    zero = half.dtype.type(0)
    least[:] = np.inf
    place[:] = 0
    for i in range(n):
        row = costs[i].reshape(-1)[:n]
        own, own_weight = half[i], weight[i]
        for j in range(n):
            apart = max(own + half[j] - row[j], zero)
            row[j] = apart * (own_weight * weight[j] / (own_weight + weight[j]))
        row[i] = np.inf
        # The costs are symmetric: a row offers itself to every column, which takes no search along the row.
        offered, least_offered, place_offered = np.int32(i % size), least[i // size], place[i // size]
        for j in range(n):
            closer = row[j] < least_offered[j]
            least_offered[j] = row[j] if closer else least_offered[j]
            place_offered[j] = offered if closer else place_offered[j]


@njit(**_options)
def match(costs: Any, place: Any, least: Any, surplus: int) -> tuple[Integers, Integers]:
    """Choose disjoint pairs: rounds of mutual nearest, the cheapest first; see `subgen.merging`.

    Parameters
    ----------
    costs : array, shape (n, spans, size)
    place, least : integer array and array, shape (n, spans)
        Of each point in each span, the cheapest partner and its cost; written over.
    surplus : int
        Most pairs.

    Returns
    -------
    first, second : int64 array, shape (pairs,)
    """
    n, spans, size = costs.shape
    taken = np.zeros(spans * size, np.bool_)
    taken[n:] = True
    partner = np.empty(n, np.int64)
    cost = np.empty(n, costs.dtype)
    for i in range(n):
        partner[i], cost[i] = _nearest(costs[i], place[i], least[i], taken)
    first = np.empty(min(surplus, n // 2), np.int64)
    second = np.empty_like(first)
    found = np.empty(n, np.int64)
    pairs = 0
    while True:
        mutual = 0
        for i in range(n):
            if i < partner[i] and partner[partner[i]] == i and cost[i] < np.inf:
                found[mutual] = i
                mutual += 1
        chosen = found[:mutual]
        if mutual > surplus - pairs:
            chosen = chosen[np.argsort(cost[chosen], kind="mergesort")[: surplus - pairs]]
        for i in chosen:
            first[pairs], second[pairs] = i, partner[i]
            pairs += 1
        if mutual == 0 or pairs == surplus:
            return first[:pairs], second[:pairs]
        for i in chosen:
            j = partner[i]
            taken[i] = taken[j] = True
            cost[i] = cost[j] = np.inf
        for i in range(n):
            if not taken[i] and taken[partner[i]]:
                partner[i], cost[i] = _nearest(costs[i], place[i], least[i], taken)


@njit(**_options)
def _nearest(costs: Any, place: Any, least: Any, taken: Any) -> Any:
    """Find the cheapest partner that is not taken, and its cost: only spans whose cheapest is taken are searched."""
    spans, size = costs.shape
    while True:
        span = 0
        for other in range(1, spans):
            if least[other] < least[span]:
                span = other
        start = span * size
        partner = start + place[span]
        if least[span] == np.inf or not taken[partner]:
            return partner, least[span]
        row = costs[span]
        smallest, where = row.dtype.type(np.inf), 0
        for j in range(size):
            if row[j] < smallest and not taken[start + j]:
                smallest, where = row[j], j
        least[span], place[span] = smallest, where
