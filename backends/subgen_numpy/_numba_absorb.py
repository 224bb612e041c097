"""Absorb half a window, compiled by numba: stream after stream without the interpreter; only BLAS is called.

Used where numba and SciPy, whose BLAS numba calls, are installed. The same steps as `subgen.default.absorb.absorb`, and
equal to it within the rounding of the dtype, but each key is read once to be copied, measured and added up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  # loaded here: threads are not the place to do it
from numba import njit
from numpy.typing import NDArray

from ._numba_merge import choose, edges, lossy, product
from ._numba_streams import OPTIONS, SUMS, finish, of_stream, take_next, view_at, wait

__all__ = ["Arguments", "absorb"]

# Rows at a time of the product of all points with each other: of each block the part from its diagonal on is computed.
_BLOCK = 288
# Rows and columns that are mirrored at once.
_TILE = 32


class Arguments(NamedTuple):
    """What `absorb` reads and writes.

    Attributes
    ----------
    tickets : int64 array, shape (2,)
        Zeros; the same for all threads.
    waits : bool
        Whether to wait for what other threads do.
    places : int64 array, shape (10, 2)
        Addresses, see `subgen_numpy._numba_streams.view_at`:

        - keys, values, counts, key variance, importance and cached neighbours of the clusters, shape
          (streams, clusters, ...): no place is free;
        - keys and values of the exact tokens, shape (streams, sink + window, dim);
        - their queries, int8, shape (streams, sink + window, head_dim), and the scales.
    integers : array of integers
        As wide as the numbers; see `subgen_numpy._numba_merge`.
    window : int
        Tokens behind the sinks.
    n_evicted : int
        See `subgen.default.absorb.AbsorbOptions`.
    weight : float
    factor : float
        Square of the softmax scale.
    ridge, value_weight, least_angle, least_ratio, most_ratio : float
        See `subgen.default.metric.Rule`.
    irregular : bool array, shape (streams,)
        Streams to leave out. Written: those too whose numbers are beyond these loops; what else is written of them is
        undefined.
    keys, values, counts, key_variance, importance : array, shape (streams, max_clusters, ...)
        Written.
    nearest : int32 array, shape (streams, max_clusters) or (streams, 0)
        The latter where no neighbour is cached.
    exact_keys, exact_values, codes, scales : array, shape (streams, sink + window, ...)
    assignment : int64 array, shape (streams, clusters + n_evicted)
    """

    tickets: NDArray[np.int64]
    waits: bool
    places: NDArray[np.int64]
    integers: Any
    window: int
    n_evicted: int
    weight: float
    factor: float
    ridge: float
    value_weight: float
    least_angle: float
    least_ratio: float
    most_ratio: float
    irregular: NDArray[np.bool_]
    keys: Any
    values: Any
    counts: NDArray[np.int64]
    key_variance: Any
    importance: Any
    nearest: NDArray[np.int32]
    exact_keys: Any
    exact_values: Any
    codes: NDArray[np.int8]
    scales: Any
    assignment: NDArray[np.int64]


@njit(**OPTIONS)
def absorb(to: Any) -> None:
    """Absorb the oldest tokens of the window in each stream; several threads may do so at once.

    Parameters
    ----------
    to : Arguments
    """
    streams, most, bands = to.key_variance.shape
    capacity, dim, value_dim, total = (
        to.exact_keys.shape[1],
        to.keys.shape[2],
        to.values.shape[2],
        to.assignment.shape[1],
    )
    n, caches, dtype, places = total - to.n_evicted, to.nearest.shape[1] > 0, to.keys.dtype, to.places
    sink = capacity - to.window
    # The pool of clusters and tokens, and its keys as points whose squared distances are costs.
    pool_keys, pool_values = np.empty((total, dim), dtype), np.empty((total, value_dim), dtype)
    pool_counts, pool_variance = np.empty(total, np.int64), np.empty((total, bands), dtype)
    pool_importance, pool_nearest = np.empty(total, dtype), np.empty(total, np.int64)
    centred, mapped = np.empty((total, dim), dtype), np.empty((total, dim), dtype)
    points, of_new = np.empty((total, dim + value_dim), dtype), np.empty((total, dim + value_dim), dtype)
    half, edge = np.empty(total, dtype), np.empty(total, dtype)
    # Memory for the costs of the pairs that are compared: none where nothing merges.
    space = np.empty(0, dtype)
    compared, nearest_cached = np.empty(total, np.int64), np.empty(total, np.int64)
    rows, metric, root = np.empty((to.window, dim), dtype), np.empty((dim, dim), dtype), np.empty((dim, dim), dtype)
    left, place = np.empty(total, np.int64), np.empty(total, np.int64)
    while True:
        s = take_next(to.tickets)
        if s >= streams:
            break
        if to.irregular[s]:
            finish(to.tickets)
            continue
        exact_keys = view_at(places, 6, s, (capacity, dim), to.keys)
        exact_values = view_at(places, 7, s, (capacity, value_dim), to.keys)
        codes, scales = view_at(places, 8, s, (capacity, dim), to.codes), view_at(places, 9, s, (capacity,), to.keys)
        counts, importance = view_at(places, 2, s, (n,), to.counts), view_at(places, 4, s, (n,), to.keys)
        _gather(view_at(places, 0, s, (n, dim), to.keys), counts, exact_keys, sink, to, pool_keys, pool_importance)
        _copy(view_at(places, 1, s, (n, value_dim), to.keys), 0, n, pool_values, 0)
        _copy(exact_values, sink, sink + to.n_evicted, pool_values, n)
        _copy(view_at(places, 3, s, (n, bands), to.keys), 0, n, pool_variance, 0)
        for i in range(n):
            pool_counts[i], pool_importance[i], pool_nearest[i] = counts[i], importance[i], -1
        for i in range(n, total):
            pool_counts[i], pool_nearest[i] = 1, -1
            for band in range(bands):
                pool_variance[i, band] = 0
        if caches:
            nearest = view_at(places, 5, s, (n,), to.nearest)
            for i in range(n):
                pool_nearest[i] = nearest[i]
        _find_metric(codes, scales, exact_keys, sink, to, rows, metric)
        to.irregular[s] = not _find_root(metric, root)
        unit = _unit(exact_values, sink, to.value_weight)
        where = of_stream(to.assignment, s)
        for i in range(total):
            where[i] = left[i] = i
        live = kept = total
        while kept > most and not to.irregular[s]:
            if kept < live:  # after the first pass
                live = kept
                _keep(left[:live], pool_keys, pool_values, pool_counts, pool_variance, pool_importance)
            _map(pool_keys[:live], pool_values[:live], pool_counts, root, unit, centred[:live], mapped[:live], points)
            if not _find_halves(points[:live], pool_importance, half):
                to.irregular[s] = True
                break
            m = _find_compared(pool_nearest[:live], live - most, compared, nearest_cached)
            if space.size < m * live:
                space = np.empty(0, dtype)  # the old one is freed first
                space = np.empty(m * live, dtype)
            costs = space[: m * live].reshape(m, live)
            _multiply(points[:live], compared[:m], of_new, costs)
            if lossy(costs, compared[:m], half[:live]):
                to.irregular[s] = True
                break
            first, second, others = _choose(
                costs,
                points[:live],
                half[:live],
                pool_importance[:live],
                compared[:m],
                nearest_cached[:live],
                live - most,
                edge,
                to.integers,
            )
            for pair in range(first.size):
                _merge(first[pair], second[pair], pool_keys, pool_values, pool_counts, pool_variance, pool_importance)
            kept = _find_places(first, second, others, live, left, place, pool_nearest, where)
        if not to.irregular[s]:
            for i in range(most):
                to.counts[s, i], to.importance[s, i] = pool_counts[left[i]], pool_importance[left[i]]
                for t in range(dim):
                    to.keys[s, i, t] = pool_keys[left[i], t]
                for t in range(value_dim):
                    to.values[s, i, t] = pool_values[left[i], t]
                for band in range(bands):
                    to.key_variance[s, i, band] = pool_variance[left[i], band]
                if caches:
                    to.nearest[s, i] = pool_nearest[i]
            _evict(exact_keys, sink, to.n_evicted, of_stream(to.exact_keys, s))
            _evict(exact_values, sink, to.n_evicted, of_stream(to.exact_values, s))
            _evict(codes, sink, to.n_evicted, of_stream(to.codes, s))
            for i in range(capacity):
                from_place = i if i < sink else i + to.n_evicted
                to.scales[s, i] = scales[from_place] if from_place < capacity else 0
        finish(to.tickets)
    if to.waits:
        wait(to.tickets, streams)


@njit(**OPTIONS)
def _copy(x: Any, start: int, end: int, to: Any, first: int) -> None:
    for i in range(start, end):
        for t in range(x.shape[1]):
            to[first + i - start, t] = x[i, t]


@njit(**OPTIONS)
def _gather(held: Any, counts: Any, exact: Any, sink: int, to: Any, keys: Any, importance: Any) -> None:
    """Put keys that leave behind those of clusters, and compute their importance; see `subgen.default.metric`."""
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
    _copy(exact, sink, sink + to.n_evicted, keys, n)
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
    for i in range(n, n + to.n_evicted):
        ratio = away[i] / mean if mean > to.least_angle else one
        ratio = min(max(ratio, held.dtype.type(to.least_ratio)), held.dtype.type(to.most_ratio))
        importance[i] = ratio * ratio * ratio * ratio * to.weight


@njit(fastmath=SUMS, **OPTIONS)
def _add_direction(keys: Any, i: int, count: Any, anchor: Any) -> Any:
    """Find the length of a key, 1 for zero, and add its direction to a sum, times the count."""
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
def _find_metric(codes: Any, scales: Any, exact: Any, sink: int, to: Any, rows: Any, moment: Any) -> None:
    """Find the second moment of queries, with a ridge; see `subgen.default.metric.query_second_moment`."""
    n_queries, trace = 0, rows.dtype.type(0)
    for i in range(rows.shape[0]):
        n_queries += scales[sink + i] > 0
        for t in range(rows.shape[1]):
            rows[i, t] = codes[sink + i, t] * scales[sink + i]
    if n_queries == 0:
        for i in range(rows.shape[0]):
            trace += product(exact, sink + i, exact, sink + i, rows.shape[1])
        mean = trace / rows.dtype.type(rows.size)
        for i in range(moment.shape[0]):
            for t in range(moment.shape[0]):
                moment[i, t] = 0
            moment[i, i] = to.factor * (mean if mean > 0 else rows.dtype.type(1))
        return
    np.dot(rows.T, rows, moment)
    share = 1 / rows.dtype.type(n_queries)
    for i in range(moment.shape[0]):
        for t in range(moment.shape[0]):
            moment[i, t] *= share
        trace += moment[i, i]
    ridge = to.ridge * trace / moment.shape[0]
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
def _unit(values: Any, sink: int, value_weight: float) -> Any:
    """Find the unit of a distance of values; see `subgen.default.metric.value_scale`."""
    whole = values.dtype.type(0)
    for i in range(sink, values.shape[0]):
        whole += np.sqrt(product(values, i, values, i, values.shape[1]))
    unit = whole / values.dtype.type((values.shape[0] - sink) * np.sqrt(value_weight))
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
    # Only differences matter: without the common offset, float32 keeps the digits.
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
def _find_compared(cached: Any, surplus: int, new: Any, nearest: Any) -> int:
    """Find the clusters that are compared with all others, and the neighbours that the others cache.

    Returns
    -------
    int
        How many are compared: they are the first of ``new``, which is written, as is ``nearest``.
    """
    n, m = cached.size, 0
    for i in range(n):
        if cached[i] < 0:
            new[m] = i
            m += 1
    if m < 2 * surplus - 1:
        for i in range(n):
            new[i] = i
        m = n
    for i in range(n):
        other = cached[i] if m < n else -1
        nearest[i] = other if other >= 0 and cached[other] >= 0 else -1
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
    """Choose pairs as `subgen_numpy.merging` does, from the products of points, which are written over."""
    edges(points, half, importance, nearest, edge[: half.size])
    bits, edge_bits = costs.view(integers.dtype), edge[: half.size].view(integers.dtype)
    return choose(costs, bits, new, half, importance, nearest, edge_bits, surplus)


@njit(**OPTIONS)
def _multiply_all(points: Any, products: Any) -> None:
    """Find the products of all points with each other, exactly symmetric."""
    n = points.shape[0]
    space = np.empty(_BLOCK * n, points.dtype)
    for start in range(0, n, _BLOCK):
        end = min(n, start + _BLOCK)
        block = space[: (end - start) * (n - start)].reshape(end - start, n - start)
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
def _merge(i: int, j: int, keys: Any, values: Any, counts: Any, variance: Any, importance: Any) -> None:
    """Merge a cluster into another; see `subgen.default.merging`."""
    dim, bands = keys.shape[1], variance.shape[1]
    width = dim // bands
    share = keys.dtype.type(counts[j]) / keys.dtype.type(counts[i] + counts[j])
    for band in range(bands):
        apart = keys.dtype.type(0)
        for t in range(band * width, (band + 1) * width):
            apart += (keys[j, t] - keys[i, t]) ** 2
        # The parallel-axis rule.
        variance[i, band] += share * (variance[j, band] - variance[i, band] + (1 - share) * (apart / width))
    for t in range(dim):
        keys[i, t] += (keys[j, t] - keys[i, t]) * share
    for t in range(values.shape[1]):
        values[i, t] += (values[j, t] - values[i, t]) * share
    counts[i] += counts[j]
    importance[i] += importance[j]


@njit(**OPTIONS)
def _keep(left: Any, keys: Any, values: Any, counts: Any, variance: Any, importance: Any) -> None:
    """Move those that stay together, in their order."""
    for i in range(left.size):
        j = left[i]
        counts[i], importance[i] = counts[j], importance[j]
        for t in range(keys.shape[1]):
            keys[i, t] = keys[j, t]
        for t in range(values.shape[1]):
            values[i, t] = values[j, t]
        for t in range(variance.shape[1]):
            variance[i, t] = variance[j, t]


@njit(**OPTIONS)
def _find_places(
    first: Any, second: Any, nearest: Any, live: int, left: Any, place: Any, new_nearest: Any, where: Any
) -> int:
    """Find the clusters left after pairs have merged, their cached neighbours, and the new place of each given one."""
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
def _evict(exact: Any, sink: int, n: int, to: Any) -> None:
    """Copy the tokens that stay, without a gap, and zeros behind them."""
    _copy(exact, 0, sink, to, 0)
    _copy(exact, sink + n, exact.shape[0], to, sink)
    for i in range(to.shape[0] - n, to.shape[0]):
        for t in range(to.shape[1]):
            to[i, t] = 0
