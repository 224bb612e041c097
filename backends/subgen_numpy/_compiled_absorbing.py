"""An absorption compiled by numba, stream after stream without the interpreter: only matrix products are called.

Used where numba and SciPy, whose BLAS numba calls, are installed. The same steps as `subgen.absorbing.absorb`, and
equal to it within the rounding of the dtype, but each key is read once to be copied, measured and added up, and
clusters are put into the new buffer, where they stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  # loaded here: threads are not the place to do it
from numba import njit

from subgen.absorbing import VALUE_WEIGHT
from subgen.merging import DIGITS, SAMPLED
from subgen.metric import LEAST_ANGLE, RIDGE

from ._compiled_merging import choose, edges, product
from ._compiled_streams import OPTIONS, SUMS, finish, in_memory, of_stream, take_next, wait

__all__ = ["absorb"]

# Rows at a time of the product of all points with each other: of each block the part from its diagonal on is computed.
_BLOCK = 288
# Rows and columns that are mirrored at once.
_TILE = 32


@njit(**OPTIONS)
def absorb(
    turns: Any,
    waits: Any,
    odd: Any,
    integers: Any,
    places: Any,
    told: Any,
    weight: float,
    leave: int,
    new_keys: Any,
    new_values: Any,
    new_counts: Any,
    new_spread: Any,
    new_importance: Any,
    new_nearest: Any,
    new_codes: Any,
    new_scales: Any,
    moved: Any,
) -> None:
    """Let the oldest tokens of the window join the clusters of each stream; several threads may do so at once.

    Parameters
    ----------
    turns : int64 array, shape (2,)
        Zeros; the same for all threads.
    waits : bool
        Whether to wait for what others do.
    odd : bool array, shape (streams,)
        Streams that are left out. Written: those too whose numbers are beyond what is done here. Nothing else that is
        written of either counts.
    integers : array of integers
        As wide as the numbers; see `subgen_numpy._compiled_merging`.
    places : int64 array, shape (11, 2)
        Where there are, see `subgen_numpy._compiled_streams.in_memory`:

        - keys, values, counts, spread, importance and nearest of the clusters that are held, shape
          (streams, clusters, ...): see `subgen.merging.Means`; counts are int64, no place is free, and nearest is not
          read if there is no ``new_nearest``;
        - keys and values that are held exactly, shape (streams, sink + window, dim);
        - queries in the window, int8, shape (streams, window, head_dim), and their scales, shape (streams, window);
        - metrics, shape (streams, head_dim, head_dim).
    told : bool
        Whether each token in the window came with queries. Then the metric is their second moment.
    weight, leave
        See `subgen.absorbing.absorb`.
    new_keys, new_values : array, shape (streams, most + sink + window, dim)
        This and what follows is written.
    new_counts : int64 array, shape (streams, most)
    new_spread, new_importance : array, shape (streams, most, ...)
    new_nearest : int32 array, shape (streams, most) or (streams, 0)
        The latter if none remembers a nearest other.
    new_codes, new_scales : array, shape (streams, window, head_dim) and (streams, window)
    moved : int64 array, shape (streams, clusters + leave)
    """
    streams, most, bands = new_spread.shape
    total, window, dim, value_dim = moved.shape[1], new_codes.shape[1], new_keys.shape[2], new_values.shape[2]
    n, room_for_exact, remembers = total - leave, new_keys.shape[1] - most, new_nearest.shape[1] > 0
    sink, dtype = room_for_exact - window, new_keys.dtype
    # What joins the clusters and merges with them, and its keys as points whose squared distances are costs.
    pool_keys, pool_values = np.empty((total, dim), dtype), np.empty((total, value_dim), dtype)
    pool_counts, pool_spread = np.empty(total, np.int64), np.empty((total, bands), dtype)
    pool_importance, pool_nearest = np.empty(total, dtype), np.empty(total, np.int64)
    centred, mapped = np.empty((total, dim), dtype), np.empty((total, dim), dtype)
    points, of_new = np.empty((total, dim + value_dim), dtype), np.empty((total, dim + value_dim), dtype)
    half, edge = np.empty(total, dtype), np.empty(total, dtype)
    # Memory for costs: as many as there are pairs that are compared, and none where nothing merges.
    room = np.empty(0, dtype)
    compared, nearest_old = np.empty(total, np.int64), np.empty(total, np.int64)
    rows, metric, root = np.empty((window, dim), dtype), np.empty((dim, dim), dtype), np.empty((dim, dim), dtype)
    left, place = np.empty(total, np.int64), np.empty(total, np.int64)
    while True:
        s = take_next(turns)
        if s >= streams:
            break
        if odd[s]:
            finish(turns)
            continue
        exact_keys = in_memory(places, 6, s, (room_for_exact, dim), new_keys)
        exact_values = in_memory(places, 7, s, (room_for_exact, value_dim), new_keys)
        codes, scales = in_memory(places, 8, s, (window, dim), new_codes), in_memory(places, 9, s, (window,), new_keys)
        counts, importance = in_memory(places, 2, s, (n,), new_counts), in_memory(places, 4, s, (n,), new_keys)
        held_keys = in_memory(places, 0, s, (n, dim), new_keys)
        _collect(held_keys, counts, exact_keys, sink, leave, weight, pool_keys, pool_importance)
        _copy(in_memory(places, 1, s, (n, value_dim), new_keys), 0, n, pool_values, 0)
        _copy(exact_values, sink, sink + leave, pool_values, n)
        _copy(in_memory(places, 3, s, (n, bands), new_keys), 0, n, pool_spread, 0)
        for i in range(n):
            pool_counts[i], pool_importance[i], pool_nearest[i] = counts[i], importance[i], -1
        for i in range(n, total):
            pool_counts[i], pool_nearest[i] = 1, -1
            for band in range(bands):
                pool_spread[i, band] = 0
        if remembers:
            nearest = in_memory(places, 5, s, (n,), new_nearest)
            for i in range(n):
                pool_nearest[i] = nearest[i]
        if told:
            _find_moment(codes, scales, rows, metric)
        else:
            _copy(in_memory(places, 10, s, (dim, dim), new_keys), 0, dim, metric, 0)
        odd[s] = not _find_root(metric, root)
        unit = _unit(exact_values, sink)
        where = of_stream(moved, s)
        for i in range(total):
            where[i] = left[i] = i
        live = kept = total
        while kept > most and not odd[s]:
            if kept < live:  # after the first pass
                live = kept
                _keep(left[:live], pool_keys, pool_values, pool_counts, pool_spread, pool_importance)
            _map(pool_keys[:live], pool_values[:live], pool_counts, root, unit, centred[:live], mapped[:live], points)
            if not _find_halves(points[:live], pool_importance, half):
                odd[s] = True
                break
            m = _find_compared(pool_nearest[:live], live - most, compared, nearest_old)
            if room.size < m * live:
                room = np.empty(0, dtype)  # what was taken goes first
                room = np.empty(min(m + m // 4, live) * live, dtype)  # the next stream may need a little more
            costs = room[: m * live].reshape(m, live)
            _multiply(points[:live], compared[:m], of_new, costs)
            if _lossy(costs, compared[:m], half[:live]):
                odd[s] = True
                break
            first, second, others = _choose(
                costs,
                points[:live],
                half[:live],
                pool_importance[:live],
                compared[:m],
                nearest_old[:live],
                live - most,
                edge,
                integers,
            )
            for pair in range(first.size):
                _merge(first[pair], second[pair], pool_keys, pool_values, pool_counts, pool_spread, pool_importance)
            kept = _find_places(first, second, others, live, left, place, pool_nearest, where)
        if not odd[s]:
            for i in range(most):
                new_counts[s, i], new_importance[s, i] = pool_counts[left[i]], pool_importance[left[i]]
                for band in range(bands):
                    new_spread[s, i, band] = pool_spread[left[i], band]
                if remembers:
                    new_nearest[s, i] = pool_nearest[i]
            _settle(pool_keys, left, most, exact_keys, sink, leave, of_stream(new_keys, s))
            _settle(pool_values, left, most, exact_values, sink, leave, of_stream(new_values, s))
            _copy(codes, leave, window, of_stream(new_codes, s), 0)
            for i in range(window):
                last = i >= window - leave
                new_scales[s, i] = 0 if last else scales[i + leave]
                if last:
                    for t in range(dim):
                        new_codes[s, i, t] = 0
        finish(turns)
    if waits:
        wait(turns, streams)


@njit(**OPTIONS)
def _copy(x: Any, start: int, end: int, to: Any, first: int) -> None:
    for i in range(start, end):
        for t in range(x.shape[1]):
            to[first + i - start, t] = x[i, t]


@njit(**OPTIONS)
def _collect(
    held: Any, counts: Any, exact: Any, sink: int, leave: int, weight: float, keys: Any, importance: Any
) -> None:
    """Put keys that leave the window behind those of clusters, and find their importance; see `subgen.metric`."""
    n, dim = held.shape
    window = exact.shape[0] - sink
    one = held.dtype.type(1)
    length, away = np.empty(n + window, held.dtype), np.empty(n + window, held.dtype)
    anchor = np.zeros((1, dim), held.dtype)
    for i in range(n):
        length[i] = _add_direction(held, i, held.dtype.type(counts[i]), anchor)
        for t in range(dim):
            keys[i, t] = held[i, t]
    for i in range(window):
        length[n + i] = _add_direction(exact, sink + i, one, anchor)
    _copy(exact, sink, sink + leave, keys, n)
    own = np.sqrt(product(anchor, 0, anchor, 0, dim))
    if own > 0:
        for t in range(dim):
            anchor[0, t] /= own
    whole, members = held.dtype.type(0), held.dtype.type(window)
    for i in range(n):
        away[i] = _away(product(held, i, anchor, 0, dim) / length[i], one)
        whole += away[i] * held.dtype.type(counts[i])
        members += held.dtype.type(counts[i])
    for i in range(n, away.size):
        away[i] = _away(product(exact, sink + i - n, anchor, 0, dim) / length[i], one)
        whole += away[i]
    mean = whole / members
    for i in range(n, n + leave):
        ratio = away[i] / mean if mean > LEAST_ANGLE else one
        ratio = min(max(ratio, held.dtype.type(0.3)), held.dtype.type(5))
        importance[i] = ratio * ratio * ratio * ratio * weight


@njit(fastmath=SUMS, **OPTIONS)
def _add_direction(keys: Any, i: int, count: Any, anchor: Any) -> Any:
    """Find the length of a key, 1 of a zero, and add its direction to a sum, as often as it counts."""
    norm = np.sqrt(product(keys, i, keys, i, keys.shape[1]))
    norm = norm if norm > 0 else keys.dtype.type(1)
    share = count / norm
    for t in range(keys.shape[1]):
        anchor[0, t] += share * keys[i, t]
    return norm


@njit(**OPTIONS)
def _away(cosine: Any, one: Any) -> Any:
    """Compute 1 - cos; 1 where it is beyond the dtype."""
    return one - cosine if np.isfinite(cosine) else one


@njit(**OPTIONS)
def _find_moment(codes: Any, scales: Any, rows: Any, moment: Any) -> None:
    """Find the second moment of queries, with a ridge; see `subgen.metric.query_moment`."""
    for i in range(rows.shape[0]):
        for t in range(rows.shape[1]):
            rows[i, t] = codes[i, t] * scales[i]
    np.dot(rows.T, rows, moment)
    share, trace = 1 / rows.dtype.type(rows.shape[0]), rows.dtype.type(0)
    for i in range(moment.shape[0]):
        for t in range(moment.shape[0]):
            moment[i, t] *= share
        trace += moment[i, i]
    ridge = RIDGE * trace / moment.shape[0] if trace > 0 else RIDGE
    for i in range(moment.shape[0]):
        moment[i, i] += ridge


@njit(**OPTIONS)
def _find_root(metric: Any, root: Any) -> bool:
    """Find the lower triangle whose product with its transpose is the metric (Cholesky); whether there is one."""
    for i in range(metric.shape[0]):
        for j in range(i):
            # On the diagonal there are inverses, at first.
            root[i, j] = (metric[i, j] - product(root, i, root, j, j)) * root[j, j]
        square = metric[i, i] - product(root, i, root, i, i)
        if not (square > 0 and square < np.inf):
            return False
        root[i, i] = 1 / np.sqrt(square)
        for j in range(i + 1, metric.shape[0]):
            root[i, j] = 0
    for i in range(metric.shape[0]):
        root[i, i] = 1 / root[i, i]
    return True


@njit(**OPTIONS)
def _unit(values: Any, sink: int) -> Any:
    """Find the unit of a distance of values; see `subgen.absorbing.value_scale`."""
    whole = values.dtype.type(0)
    for i in range(sink, values.shape[0]):
        whole += np.sqrt(product(values, i, values, i, values.shape[1]))
    unit = whole / values.dtype.type((values.shape[0] - sink) * VALUE_WEIGHT**0.5)
    return unit if unit > 0 else values.dtype.type(1)


@njit(fastmath=SUMS, **OPTIONS)
def _map(keys: Any, values: Any, counts: Any, root: Any, unit: Any, centred: Any, mapped: Any, points: Any) -> None:
    """Find points whose squared distances are those of keys in the metric and of values together."""
    n, dim = keys.shape
    members = keys.dtype.type(0)
    offset = np.zeros(dim, keys.dtype)
    for i in range(n):
        count = keys.dtype.type(counts[i])
        members += count
        for t in range(dim):
            offset[t] += count * keys[i, t]
    # Differences are all that matters: without the common offset, float32 keeps the digits.
    for t in range(dim):
        offset[t] /= members
    for i in range(n):
        for t in range(dim):
            centred[i, t] = keys[i, t] - offset[t]
    np.dot(centred, root, mapped)
    share = 1 / unit
    for i in range(n):
        for t in range(dim):
            points[i, t] = mapped[i, t]
        for t in range(values.shape[1]):
            points[i, dim + t] = values[i, t] * share


@njit(**OPTIONS)
def _find_halves(points: Any, importance: Any, half: Any) -> bool:
    """Find half of the square of each point; whether these, and importance, are such that costs are finite."""
    most = np.sqrt(np.finfo(half.dtype).max) / 4
    tame = True
    for i in range(points.shape[0]):
        half[i] = half.dtype.type(0.5) * product(points, i, points, i, points.shape[1])
        tame = tame and half[i] < most and importance[i] > 0
    return tame


@njit(**OPTIONS)
def _find_compared(remembered: Any, surplus: int, new: Any, nearest: Any) -> int:
    """Count the clusters that are compared with all others; write them, and cached neighbours of the rest."""
    n, m = remembered.size, 0
    for i in range(n):
        if remembered[i] < 0:
            new[m] = i
            m += 1
    if m < 2 * surplus - 1:
        for i in range(n):
            new[i] = i
        m = n
    for i in range(n):
        other = remembered[i] if m < n else -1
        nearest[i] = other if other >= 0 and remembered[other] >= 0 else -1
    return m


@njit(**OPTIONS)
def _multiply(points: Any, new: Any, of_new: Any, products: Any) -> None:
    """Find the products of some points with all."""
    m = new.size
    if m == points.shape[0]:
        _multiply_all(points, products)
    else:
        for r in range(m):
            for t in range(points.shape[1]):
                of_new[r, t] = points[new[r], t]
        np.dot(of_new[:m], points.T, products)


@njit(**OPTIONS)
def _lossy(products: Any, new: Any, half: Any) -> bool:
    """Whether float32 has lost the digits of most nearest distances; see `subgen.merging.ward_costs`."""
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


@njit(**OPTIONS)
def _choose(
    costs: Any,
    points: Any,
    half: Any,
    importance: Any,
    new: Any,
    nearest: Any,
    surplus: int,
    edge: Any,
    integers: Any,
) -> Any:
    """Choose pairs as `subgen_numpy._merging` does, from the products of points, which are written over."""
    edges(points, half, importance, nearest, edge[: half.size])
    bits, edge_bits = costs.view(integers.dtype), edge[: half.size].view(integers.dtype)
    return choose(costs, bits, new, half, importance, nearest, edge_bits, surplus)


@njit(**OPTIONS)
def _multiply_all(points: Any, products: Any) -> None:
    """Find the products of all points with each other, exactly symmetric."""
    n = points.shape[0]
    room = np.empty(_BLOCK * n, points.dtype)
    for start in range(0, n, _BLOCK):
        end = min(n, start + _BLOCK)
        block = room[: (end - start) * (n - start)].reshape(end - start, n - start)
        np.dot(points[start:end], points[start:].T, block)
        for i in range(start, end):
            for j in range(i, n):
                products[i, j] = block[i - start, j - start]
    for top in range(0, n, _TILE):
        for start in range(0, top + 1, _TILE):
            for i in range(top, min(n, top + _TILE)):
                for j in range(start, min(i, start + _TILE)):
                    products[i, j] = products[j, i]


@njit(**OPTIONS)
def _merge(i: int, j: int, keys: Any, values: Any, counts: Any, spread: Any, importance: Any) -> None:
    """Merge a cluster into another; see `subgen.merging`."""
    dim, bands = keys.shape[1], spread.shape[1]
    width = dim // bands
    share = keys.dtype.type(counts[j]) / keys.dtype.type(counts[i] + counts[j])
    for band in range(bands):
        apart = keys.dtype.type(0)
        for t in range(band * width, (band + 1) * width):
            apart += (keys[j, t] - keys[i, t]) ** 2
        # The parallel-axis rule.
        spread[i, band] += share * (spread[j, band] - spread[i, band] + (1 - share) * (apart / width))
    for t in range(dim):
        keys[i, t] += (keys[j, t] - keys[i, t]) * share
    for t in range(values.shape[1]):
        values[i, t] += (values[j, t] - values[i, t]) * share
    counts[i] += counts[j]
    importance[i] += importance[j]


@njit(**OPTIONS)
def _keep(left: Any, keys: Any, values: Any, counts: Any, spread: Any, importance: Any) -> None:
    """Move those that stay together, in their order."""
    for i in range(left.size):
        j = left[i]
        counts[i], importance[i] = counts[j], importance[j]
        for t in range(keys.shape[1]):
            keys[i, t] = keys[j, t]
        for t in range(values.shape[1]):
            values[i, t] = values[j, t]
        for t in range(spread.shape[1]):
            spread[i, t] = spread[j, t]


@njit(**OPTIONS)
def _find_places(
    first: Any, second: Any, nearest: Any, live: int, left: Any, place: Any, new_nearest: Any, where: Any
) -> int:
    """Find who stays after pairs have merged, whom each of them remembers, and where each that came is now."""
    for i in range(live):
        place[i] = 0
    for pair in range(first.size):
        place[second[pair]] = -1
    kept = 0
    for i in range(live):
        if place[i] == 0:
            place[i], left[kept] = kept, i
            kept += 1
    for i in range(kept):
        other = nearest[left[i]]
        new_nearest[i] = place[other] if other >= 0 else -1
    for pair in range(first.size):
        place[second[pair]] = place[first[pair]]
    for i in range(where.size):
        where[i] = place[where[i]]
    return kept


@njit(**OPTIONS)
def _settle(pool: Any, left: Any, most: int, exact: Any, sink: int, leave: int, to: Any) -> None:
    """Put those that stay before the exact tokens, and zeros in the room of those that have left."""
    for i in range(most):
        for t in range(to.shape[1]):
            to[i, t] = pool[left[i], t]
    _copy(exact, 0, sink, to, most)
    _copy(exact, sink + leave, exact.shape[0], to, most + sink)
    for i in range(to.shape[0] - leave, to.shape[0]):
        for t in range(to.shape[1]):
            to[i, t] = 0
