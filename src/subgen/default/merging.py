"""Merge the closest pairs of clusters, in rounds of mutual nearest neighbours, until they fit the budget.

A round takes all pairs at once (as many as are needed, cheapest first) in which each is the other's nearest. It is
parallel over pairs and streams, and in trials as good as merging one cheapest pair at a time.

With many clusters, each caches its nearest neighbour. Only new clusters, and those that have merged, are compared
with all others; of two unchanged clusters a pair is considered if one is cached as the nearest of the other. That is a
fraction of all pairs. The error does not grow measurably as long as all are compared now and then
(docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from .._array import Array, array_namespace, clip, pieces, positions
from .._tree import concat, tree_map
from ..backends import operation
from .state import Clusters

__all__ = [
    "DIGITS",
    "SAMPLED",
    "band_means",
    "bands",
    "concat",
    "merge_closest",
    "merge_streams",
    "n_live",
    "no_neighbours",
    "singletons",
    "ward_costs",
]

# A squared distance below this share of the squares that it is the difference of has lost its digits in float32; and
# clusters that are looked at.
DIGITS = 2.0**-17
SAMPLED = 16


def bands(head_dim: int) -> int:
    """Return the number of bands of adjacent coordinates, each with a key variance of its own: 4, or 1.

    Rotary positions rotate each pair of coordinates at its own frequency, and the frequency falls along the
    coordinates: the keys of merged tokens vary most in the fast ones.
    """
    return 4 if head_dim % 4 == 0 else 1


def band_means(x: Array) -> Array:
    """Average over the coordinates of each band: ``(..., head_dim)`` to ``(..., bands)``."""
    xp = array_namespace(x)
    return xp.mean(xp.reshape(x, (*x.shape[:-1], bands(x.shape[-1]), -1)), axis=-1)


def singletons(
    keys: Array, values: Array, importance: Array, leaders: Array | None = None, *, cache_nearest: bool = False
) -> Clusters:
    """Turn each token into a cluster of one.

    Parameters
    ----------
    keys, values : array, shape (streams, n, dim)
        In float32 or float64.
    importance : array, shape (streams, n)
    leaders : array, shape (streams, n, head_dim), or None
    cache_nearest : bool
        Whether the clusters have places for their nearest neighbours.

    Returns
    -------
    Clusters
    """
    xp = array_namespace(keys)
    shape, device = tuple(keys.shape[:2]), keys.device
    counts = xp.ones(shape, dtype=xp.int64, device=device)
    return Clusters(
        keys=keys,
        values=values,
        counts=counts,
        key_variance=xp.zeros((*shape, bands(keys.shape[-1])), dtype=keys.dtype, device=device),
        importance=importance,
        leaders=leaders,
        nearest=no_neighbours(counts) if cache_nearest else None,
    )


def no_neighbours(counts: Array) -> Array:
    """Return a cache without any nearest neighbour: -1, int32, shape (streams, clusters)."""
    xp = array_namespace(counts)
    return xp.full(counts.shape, -1, dtype=xp.int32, device=counts.device)


def n_live(clusters: Clusters) -> Array:
    """Count the clusters that have members: int64, shape (streams,)."""
    xp = array_namespace(clusters.counts)
    return xp.sum(xp.astype(clusters.counts > 0, xp.int64), axis=-1)


def ward_costs(clusters: Clusters, metric: Array | None, value_scale: Array) -> Array:
    """Cost of merging each pair: ``w_i w_j / (w_i + w_j) (|k_i - k_j|_M^2 + |v_i - v_j|^2 / value_scale^2)``.

    Ward's criterion in a space of logits and values, weighted by importance.

    Parameters
    ----------
    clusters : Clusters
    metric : array, shape (streams, head_dim, head_dim), or None
        M, the second moment of the queries: ``|k|_M^2`` is the mean square of a query's logit of k.
        ``None`` is the identity.
    value_scale : array, shape (streams,)
        Typical norm of a value.

    Returns
    -------
    array, shape (streams, clusters, clusters)
        Symmetric; ``inf`` on the diagonal and wherever a place is free.

    Notes
    -----
    Distances are computed from products. Where clusters lie much closer to each other than to their common mean (two
    far groups of keys), float32 does not have the digits: such streams are computed in float64.
    """
    xp = array_namespace(clusters.keys)
    costs, lossy = _costs(clusters, metric, value_scale)
    if lossy is None or not bool(xp.any(lossy)):
        return costs
    names = ("keys", "values", "importance")
    precise = replace(clusters, **{name: xp.astype(getattr(clusters, name), xp.float64) for name in names})
    precise_metric = None if metric is None else xp.astype(metric, xp.float64)
    found, _ = _costs(precise, precise_metric, xp.astype(value_scale, xp.float64))
    return xp.where(lossy[:, None, None], xp.astype(found, costs.dtype), costs)


def _costs(clusters: Clusters, metric: Array | None, value_scale: Array) -> tuple[Array, Array | None]:
    """Compute costs in the dtype of the means, and, below float64, the streams whose digits that loses: bool."""
    xp = array_namespace(clusters.keys)
    live = clusters.counts > 0
    # Only differences matter: without the common offset, float32 keeps the digits.
    weight = xp.astype(clusters.counts, clusters.keys.dtype)
    weight = weight / xp.sum(weight, axis=-1, keepdims=True)
    keys = clusters.keys - xp.sum(clusters.keys * weight[:, :, None], axis=1, keepdims=True)
    mapped = keys if metric is None else xp.matmul(keys, metric)
    values = clusters.values / value_scale[:, None, None]
    norms = xp.sum(mapped * keys, axis=-1) + xp.sum(values * values, axis=-1)
    cross = xp.matmul(mapped, xp.matrix_transpose(keys)) + xp.matmul(values, xp.matrix_transpose(values))
    # The two halves of a product may round differently; mutual neighbours need exact symmetry.
    cross = cross + xp.matrix_transpose(cross)
    lossy = None if clusters.keys.dtype == xp.float64 else _lossy(norms, cross, live)
    w, index = clusters.importance, positions(keys.shape[1], keys)
    # Infinite only where nothing may merge, whatever the keys.
    largest = float(xp.finfo(cross.dtype).max) ** 0.5
    rows = []
    for part in pieces(keys.shape[1], keys.shape[0] * keys.shape[1], keys):
        squared = norms[:, part, None] + norms[:, None, :] - cross[:, part, :]
        total = w[:, part, None] + w[:, None, :]
        factor = w[:, part, None] * w[:, None, :] / xp.where(total > 0, total, xp.ones_like(total))
        costs = xp.where(squared > 0, clip(squared, None, largest), xp.zeros_like(squared)) * factor
        possible = live[:, part, None] & live[:, None, :] & (index[part, None] != index[None, :])[None, :, :]
        rows.append(xp.where(possible, costs, xp.full_like(costs, math.inf)))
    return concat(rows, axis=1), lossy


def _lossy(norms: Array, cross: Array, live: Array) -> Array:
    """Return streams in which most nearest distances are below the digits of their products: bool, shape (streams,).

    A few clusters, evenly spaced, stand for all.
    """
    xp, n = array_namespace(norms), norms.shape[1]
    rows, index = slice(None, None, max(1, -(-n // SAMPLED))), positions(n, norms)
    sums = norms[:, rows, None] + norms[:, None, :]
    others = live[:, None, :] & (index[rows, None] != index[None, :])[None, :, :]
    lost = live[:, rows] & xp.any(others & (sums - cross[:, rows, :] < DIGITS * sums), axis=-1)
    lost, counted = (xp.sum(xp.astype(x, xp.int64), axis=-1) for x in (lost, live[:, rows]))
    return 2 * lost > counted


@operation
def merge_closest(
    clusters: Clusters, metric: Array | None, value_scale: Array, max_clusters: int, capacity: int
) -> tuple[Clusters, Array]:
    """Merge closest pairs until at most ``max_clusters`` are left in every stream.

    Parameters
    ----------
    clusters : Clusters
        In float32 or float64. With cached neighbours only some pairs are compared: those of which one is new (not
        compared with all others since it last changed), and those of which one is cached as the nearest of the other.
        In a stream with fewer than ``2 * surplus - 1`` new clusters, all pairs are. So there are always enough pairs
        for the surplus, or for half of the clusters.
    metric, value_scale
        As in `subgen.default.merging.ward_costs`.
    max_clusters : int
        At least 1.
    capacity : int
        Cluster slots of the result; at least the number of clusters left.

    Returns
    -------
    clusters : Clusters
        The clusters first, in their order, and free places behind them. With cached neighbours, those of the clusters
        that did not merge, among themselves; unchanged in a stream where nothing had to merge.
    assignment : int64 array, shape (streams, places before)
        The new place of each cluster given.

    Notes
    -----
    Where something has to merge, the costs of all pairs of a stream are held at once. Streams take turns where those of
    all together are beyond ``subgen._array.transient_limit``.
    """
    streams, n = clusters.counts.shape
    parts = pieces(streams, n * n, clusters.counts)
    if len(parts) == 1 or not bool(array_namespace(clusters.counts).any(n_live(clusters) > max_clusters)):
        return _merge_closest(clusters, metric, value_scale, max_clusters, capacity)
    return merge_streams(_merge_closest, parts, clusters, metric, value_scale, max_clusters, capacity)


def merge_streams(
    merge: Callable[..., tuple[Clusters, Array]],
    parts: list[slice],
    clusters: Clusters,
    metric: Array | None,
    value_scale: Array,
    max_clusters: int,
    capacity: int,
) -> tuple[Clusters, Array]:
    """Merge the clusters of a few streams after those of others; see `merge_closest`, which ``merge`` is for a part."""
    merged = []
    for part in parts:
        own_metric = metric if metric is None or metric.shape[0] == 1 else metric[part, ...]
        own = tree_map(lambda x, part=part: x[part, ...], clusters)
        merged.append(merge(own, own_metric, value_scale[part], max_clusters, capacity))
    return concat(merged, axis=0)


def _merge_closest(
    clusters: Clusters, metric: Array | None, value_scale: Array, max_clusters: int, capacity: int
) -> tuple[Clusters, Array]:
    """Merge the clusters of all streams together; see `merge_closest`."""
    xp = array_namespace(clusters.keys)
    index = positions(clusters.counts.shape[1], clusters.keys)[None, :]
    assignment = xp.broadcast_to(index, clusters.counts.shape)
    while True:
        surplus = n_live(clusters)[:, None] - max_clusters
        if not bool(xp.any(surplus > 0)):
            break
        costs = ward_costs(clusters, metric, value_scale)
        if clusters.nearest is not None:
            costs = _of_compared(costs, clusters.nearest, clusters.counts > 0, surplus)
        partner, keeps, goes, nearest = _match(costs, surplus)
        clusters = _merge(clusters, partner, keeps, goes)
        if clusters.nearest is not None:
            clusters = replace(clusters, nearest=xp.where(surplus > 0, xp.astype(nearest, xp.int32), clusters.nearest))
        target = xp.where(goes, partner, index)
        assignment = xp.take_along_axis(target, assignment, axis=1)
    order = xp.argsort(xp.astype(clusters.counts <= 0, xp.int8), axis=-1, stable=True)
    place = xp.argsort(order, axis=-1, stable=True)
    assignment = xp.take_along_axis(place, assignment, axis=1)
    if clusters.nearest is not None:
        found = xp.take_along_axis(place, xp.astype(clip(clusters.nearest, 0, None), xp.int64), axis=1)
        cached = xp.where(clusters.nearest < 0, clusters.nearest, xp.astype(found, xp.int32))
        clusters = replace(clusters, nearest=cached)
    return tree_map(lambda x: _pick(x, order[:, :capacity]), clusters), assignment


def _of_compared(costs: Array, nearest: Array, live: Array, surplus: Array) -> Array:
    """Return the costs of the pairs that are compared, infinity elsewhere: shape (streams, n, n)."""
    xp = array_namespace(costs)
    rows = []
    for part in pieces(costs.shape[1], costs.shape[0] * costs.shape[1], costs):
        some = costs[:, part, :]
        rows.append(xp.where(_compared(nearest, live, surplus, part), some, xp.full_like(some, math.inf)))
    return concat(rows, axis=1)


def _compared(nearest: Array, live: Array, surplus: Array, rows: slice = slice(None)) -> Array:
    """Select the pairs of some clusters with all others that are compared: bool, shape (streams, rows, n)."""
    xp = array_namespace(nearest)
    index = xp.astype(positions(nearest.shape[1], nearest), xp.int32)
    cached = (nearest[:, rows, None] == index[None, None, :]) | (nearest[:, None, :] == index[None, rows, None])
    new = (nearest < 0) & live
    few = xp.sum(xp.astype(new, xp.int64), axis=-1, keepdims=True) < 2 * surplus - 1
    new = new | few
    return new[:, rows, None] | new[:, None, :] | cached


def _match(costs: Array, surplus: Array) -> tuple[Array, Array, Array, Array]:
    """Choose disjoint pairs, as many as the surplus or as there are: a greedy matching, in parallel.

    Rounds of mutual nearest neighbours among those not yet in a pair. The costs are computed once, so a merged cluster
    does not merge again in the same call.

    Parameters
    ----------
    costs : array, shape (streams, n, n)
        From `ward_costs`; infinite where a pair is not compared.
    surplus : int64 array, shape (streams, 1)

    Returns
    -------
    partner : int64 array, shape (streams, n)
    keeps, goes : bool arrays, shape (streams, n)
        The first and the second of each pair.
    nearest : int64 array, shape (streams, n)
        For each unpaired cluster, the nearest unpaired other; -1 where there is none.
    """
    xp = array_namespace(costs)
    index = positions(costs.shape[1], costs)[None, :]
    chosen = xp.broadcast_to(index, costs.shape[:2])
    keeps = xp.zeros(costs.shape[:2], dtype=xp.bool, device=costs.device)
    goes = keeps
    while True:
        taken = keeps | goes
        penalty = xp.where(taken, xp.full_like(costs[:, 0, :], math.inf), xp.zeros_like(costs[:, 0, :]))
        partner, cost = _cheapest(costs, penalty)
        cost = cost + penalty
        mutual = (xp.take_along_axis(partner, partner, axis=1) == index) & (cost < math.inf)
        first = mutual & (index < partner)
        # The cheapest of the pairs, as many as the surplus.
        order = xp.argsort(xp.where(first, cost, xp.full_like(cost, math.inf)), axis=-1, stable=True)
        first = first & (xp.argsort(order, axis=-1, stable=True) < surplus)
        second = mutual & (index > partner) & xp.take_along_axis(first, partner, axis=1)
        if not bool(xp.any(first)):
            nearest = xp.where(cost < math.inf, partner, xp.full_like(partner, -1))
            return chosen, keeps, goes, nearest
        chosen = xp.where(first | second, partner, chosen)
        keeps, goes = keeps | first, goes | second
        surplus = surplus - xp.sum(xp.astype(first, xp.int64), axis=-1, keepdims=True)


def _cheapest(costs: Array, penalty: Array) -> tuple[Array, Array]:
    """Find the cheapest partner of each cluster, and that cost with the partner's penalty: ``(streams, n)`` each."""
    xp = array_namespace(costs)
    cheapest = []
    for part in pieces(costs.shape[1], costs.shape[0] * costs.shape[1], costs):
        open_costs = costs[:, part, :] + penalty[:, None, :]
        partner = xp.argmin(open_costs, axis=-1)
        cheapest.append((partner, xp.take_along_axis(open_costs, partner[:, :, None], axis=2)[:, :, 0]))
    return concat(cheapest, axis=1)


def _merge(clusters: Clusters, partner: Array, keeps: Array, goes: Array) -> Clusters:
    """Merge each partner into the cluster marked by ``keeps``; free the places marked by ``goes``."""
    xp = array_namespace(clusters.keys)
    counts = clusters.counts
    added = xp.where(keeps, _pick(counts, partner), xp.zeros_like(counts))
    total = counts + added
    wide = clusters.keys.dtype
    share = xp.astype(added, wide) / xp.astype(xp.where(total > 0, total, xp.ones_like(total)), wide)
    difference = _pick(clusters.keys, partner) - clusters.keys
    apart = band_means(difference * difference)
    variance = clusters.key_variance
    return Clusters(
        keys=clusters.keys + difference * share[:, :, None],
        values=clusters.values + (_pick(clusters.values, partner) - clusters.values) * share[:, :, None],
        counts=xp.where(goes, xp.zeros_like(counts), total),
        # The parallel-axis rule.
        key_variance=variance
        + share[:, :, None] * (_pick(variance, partner) - variance + (1.0 - share)[:, :, None] * apart),
        importance=xp.where(keeps, clusters.importance + _pick(clusters.importance, partner), clusters.importance),
        leaders=clusters.leaders,
        nearest=clusters.nearest,
    )


def _pick(x: Array, places: Array) -> Array:
    """Take places of each stream: ``(streams, clusters, ...)`` by int64 ``(streams, m)``."""
    xp = array_namespace(x)
    return xp.take_along_axis(x, places if x.ndim == 2 else places[:, :, None], axis=1)
