"""Fixed memory: merge the closest pairs of clusters, in rounds of mutual nearest neighbours.

A round takes all pairs at once (as many as are needed, cheapest first) in which each is the other's nearest. It is
parallel over pairs and streams, and in trials as good as merging one cheapest pair at a time.

Clusters remember their nearest other. Only new ones, and those that have merged, are compared with all others; two that
stay as they are may merge if one is remembered as the nearest of the other. That is a fraction of all pairs, and costs
no accuracy to speak of as long as all are compared now and then (docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ._array import Array, array_namespace, clip, concat, positions
from ._memory import pieces

__all__ = [
    "DIGITS",
    "SAMPLED",
    "Means",
    "band_means",
    "bands",
    "clusters_of_one",
    "join",
    "merge_closest",
    "merge_in_parts",
    "n_live",
    "nobody",
    "ward_costs",
]


# A squared distance below this share of the squares that it is the difference of has lost its digits in float32; and
# clusters that are looked at.
DIGITS = 2.0**-17
SAMPLED = 16


@dataclass(frozen=True)
class Means:
    """Clusters as weighted pairs, in float32 or float64.

    Attributes
    ----------
    keys, values : array, shape (streams, clusters, head_dim) and (streams, clusters, value_dim)
        Means of the members. As they are stored they may be `subgen.rounding.Codes`.
    counts : int64 array, shape (streams, clusters)
        Number of members; zero marks a place that is free.
    spread : array, shape (streams, clusters, bands)
        Variance of the members' keys about their mean, averaged over the coordinates of each band; see `bands`.
    importance : array, shape (streams, clusters)
        What merging this cluster costs, see `ward_costs`; adds up in a merge. As they are stored in 16 bits, this and
        the spread are roots, see `subgen.rounding.round_roots`: of the spread, the standard deviation.
    leaders : array, shape (streams, clusters, head_dim), or None
        The key that opened each cluster, in the dtype of the input; see `subgen.leaders`.
    nearest : int32 array, shape (streams, clusters), or None
        The place of the nearest other, of those that each was compared with; -1 for one that has not been compared with
        all others as it is now, and for a free place. ``None`` if no cluster has been.
    """

    keys: Array
    values: Array
    counts: Array
    spread: Array
    importance: Array
    leaders: Array | None = None
    nearest: Array | None = None

    def each(self, function: Callable[[Array], Array]) -> Means:
        """Apply a function to every array."""
        return Means(*(None if x is None else function(x) for x in self.arrays()))

    def with_each(self, other: Means, function: Callable[[Array, Array], Array]) -> Means:
        """Apply a function to every array and that of another."""
        pairs = zip(self.arrays(), other.arrays(), strict=True)
        return Means(*(None if a is None else function(a, b) for a, b in pairs))

    def part(self, places: slice) -> Means:
        """Return the clusters in some places."""
        return self.each(lambda x: x[:, places, ...])

    def of_streams(self, streams: slice) -> Means:
        """Return the clusters of some streams."""
        return self.each(lambda x: x[streams, ...])

    def arrays(self) -> tuple[Array | None, ...]:
        """Return the arrays, in the order of the fields."""
        return self.keys, self.values, self.counts, self.spread, self.importance, self.leaders, self.nearest


def bands(head_dim: int) -> int:
    """Return the number of bands of adjacent coordinates that the spread of keys is told apart by: 4, or 1.

    Rotary positions turn each pair of coordinates at its own frequency, and the frequency falls along the
    coordinates: merged tokens spread along the fast ones most.
    """
    return 4 if head_dim % 4 == 0 else 1


def band_means(x: Array) -> Array:
    """Average over the coordinates of each band: ``(..., head_dim)`` to ``(..., bands)``."""
    xp = array_namespace(x)
    return xp.mean(xp.reshape(x, (*x.shape[:-1], bands(x.shape[-1]), -1)), axis=-1)


def clusters_of_one(
    keys: Array, values: Array, importance: Array, leaders: Array | None = None, *, remember: bool = False
) -> Means:
    """Make each token a cluster: ``(streams, n, dim)``, and importance ``(streams, n)``, in float32 or float64.

    With ``remember`` they have places for their nearest others, with which they have not been compared.
    """
    xp = array_namespace(keys)
    shape, device = tuple(keys.shape[:2]), keys.device
    counts = xp.ones(shape, dtype=xp.int64, device=device)
    return Means(
        keys=keys,
        values=values,
        counts=counts,
        spread=xp.zeros((*shape, bands(keys.shape[-1])), dtype=keys.dtype, device=device),
        importance=importance,
        leaders=leaders,
        nearest=nobody(counts) if remember else None,
    )


def nobody(counts: Array) -> Array:
    """Return the nearest others of clusters that have not been compared: int32, shape (streams, clusters)."""
    xp = array_namespace(counts)
    return xp.full(counts.shape, -1, dtype=xp.int32, device=counts.device)


def join(first: Means, second: Means) -> Means:
    """Put the clusters of one behind those of the other, none of which remembers a nearest."""
    xp = array_namespace(first.keys)
    return first.with_each(second, lambda a, b: xp.concat([a, b], axis=1))


def n_live(means: Means) -> Array:
    """Count the clusters: int64, shape (streams,)."""
    xp = array_namespace(means.counts)
    return xp.sum(xp.astype(means.counts > 0, xp.int64), axis=-1)


def ward_costs(means: Means, metric: Array | None, value_scale: Array) -> Array:
    """Cost of merging each pair: ``w_i w_j / (w_i + w_j) (|k_i - k_j|_M^2 + |v_i - v_j|^2 / value_scale^2)``.

    Ward's criterion in a space of logits and values, weighted by importance.

    Parameters
    ----------
    means : Means
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
    xp = array_namespace(means.keys)
    costs, lossy = _costs(means, metric, value_scale)
    if lossy is None or not bool(xp.any(lossy)):
        return costs
    names = ("keys", "values", "importance")
    precise = replace(means, **{name: xp.astype(getattr(means, name), xp.float64) for name in names})
    precise_metric = None if metric is None else xp.astype(metric, xp.float64)
    found, _ = _costs(precise, precise_metric, xp.astype(value_scale, xp.float64))
    return xp.where(lossy[:, None, None], xp.astype(found, costs.dtype), costs)


def _costs(means: Means, metric: Array | None, value_scale: Array) -> tuple[Array, Array | None]:
    """Compute costs in the dtype of the means, and, below float64, the streams whose digits that loses: bool."""
    xp = array_namespace(means.keys)
    live = means.counts > 0
    # Differences are all that matters: without the common offset, float32 keeps the digits.
    weight = xp.astype(means.counts, means.keys.dtype)
    weight = weight / xp.sum(weight, axis=-1, keepdims=True)
    keys = means.keys - xp.sum(means.keys * weight[:, :, None], axis=1, keepdims=True)
    mapped = keys if metric is None else xp.matmul(keys, metric)
    values = means.values / value_scale[:, None, None]
    norms = xp.sum(mapped * keys, axis=-1) + xp.sum(values * values, axis=-1)
    cross = xp.matmul(mapped, xp.matrix_transpose(keys)) + xp.matmul(values, xp.matrix_transpose(values))
    # The two halves of a product may round differently; mutual neighbours need exact symmetry.
    cross = cross + xp.matrix_transpose(cross)
    lossy = None if means.keys.dtype == xp.float64 else _lossy(norms, cross, live)
    w, index = means.importance, positions(keys.shape[1], keys)
    # No cost is infinite but where nothing may merge, whatever the keys.
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


def merge_closest(
    means: Means, metric: Array | None, value_scale: Array, most: int, places: int
) -> tuple[Means, Array]:
    """Merge closest pairs until at most a number of clusters is left in every stream.

    Parameters
    ----------
    means : Means
        With ``nearest``, only pairs are compared of which one is new, that is, has not been compared with all others,
        or remembers the other as its nearest; all, in a stream with fewer new ones than two less one for each that is
        over ``most``. So there are always as many pairs as have to merge, or as half of what there is.
    metric, value_scale
        As in `subgen.merging.ward_costs`.
    most : int
        At least 1.
    places : int
        Places of the result; at least as many as clusters are left.

    Returns
    -------
    means : Means
        The clusters first, in their order, and free places behind them. ``nearest``, if it was given, is that of those
        that did not merge among themselves; where nothing had to merge in a stream, what it was.
    moved : int64 array, shape (streams, places before)
        The new place of each cluster that was given.

    Notes
    -----
    Where something has to merge, the costs of all pairs of a stream are held at once. Streams take turns where those of
    all together are beyond ``subgen._memory.transient_limit``.
    """
    streams, n = means.counts.shape
    xp = array_namespace(means.counts)
    parts = pieces(streams, n * n, means.counts)
    if len(parts) == 1 or not bool(xp.any(n_live(means) > most)):
        return _merge_closest(means, metric, value_scale, most, places)
    return merge_in_parts(_merge_closest, parts, means, metric, value_scale, most, places)


def merge_in_parts(
    merge: Callable[..., tuple[Means, Array]],
    parts: list[slice],
    means: Means,
    metric: Array | None,
    value_scale: Array,
    most: int,
    places: int,
) -> tuple[Means, Array]:
    """Merge the clusters of some streams after those of others; see `merge_closest`, which ``merge`` is for a part."""
    xp = array_namespace(means.counts)
    some = [
        merge(
            means.of_streams(part),
            metric if metric is None or metric.shape[0] == 1 else metric[part, ...],
            value_scale[part],
            most,
            places,
        )
        for part in parts
    ]
    columns = zip(*(merged.arrays() for merged, _ in some), strict=True)
    merged = Means(*(None if x[0] is None else xp.concat(list(x), axis=0) for x in columns))
    return merged, xp.concat([moved for _, moved in some], axis=0)


def _merge_closest(
    means: Means, metric: Array | None, value_scale: Array, most: int, places: int
) -> tuple[Means, Array]:
    """Merge the clusters of all streams together; see `merge_closest`."""
    xp = array_namespace(means.keys)
    moved = xp.broadcast_to(positions(means.counts.shape[1], means.keys)[None, :], means.counts.shape)
    while True:
        surplus = n_live(means)[:, None] - most
        if not bool(xp.any(surplus > 0)):
            break
        costs = ward_costs(means, metric, value_scale)
        if means.nearest is not None:
            costs = _of_compared(costs, means.nearest, means.counts > 0, surplus)
        partner, keeps, goes, nearest = _match(costs, surplus)
        means = _merge(means, partner, keeps, goes)
        if means.nearest is not None:
            means = replace(means, nearest=xp.where(surplus > 0, xp.astype(nearest, xp.int32), means.nearest))
        target = xp.where(goes, partner, positions(partner.shape[1], partner)[None, :])
        moved = xp.take_along_axis(target, moved, axis=1)
    order = xp.argsort(xp.astype(means.counts <= 0, xp.int8), axis=-1, stable=True)
    place = xp.argsort(order, axis=-1, stable=True)
    moved = xp.take_along_axis(place, moved, axis=1)
    if means.nearest is not None:
        found = xp.take_along_axis(place, xp.astype(clip(means.nearest, 0, None), xp.int64), axis=1)
        means = replace(means, nearest=xp.where(means.nearest < 0, means.nearest, xp.astype(found, xp.int32)))
    return means.each(lambda x: _pick(x, order[:, :places])), moved


def _of_compared(costs: Array, nearest: Array, live: Array, surplus: Array) -> Array:
    """Return the costs of the pairs that are compared, infinity elsewhere: shape (streams, n, n)."""
    xp = array_namespace(costs)
    rows = []
    for part in pieces(costs.shape[1], costs.shape[0] * costs.shape[1], costs):
        some = costs[:, part, :]
        rows.append(xp.where(_compared(nearest, live, surplus, part), some, xp.full_like(some, math.inf)))
    return concat(rows, axis=1)


def _compared(nearest: Array, live: Array, surplus: Array, rows: slice = slice(None)) -> Array:
    """Tell which pairs of some clusters and all others are compared: bool, shape (streams, rows, n)."""
    xp = array_namespace(nearest)
    index = xp.astype(positions(nearest.shape[1], nearest), xp.int32)
    remembered = nearest[:, rows, None] == index[None, None, :]
    remembered = remembered | (nearest[:, None, :] == index[None, rows, None])
    new = (nearest < 0) & live
    few = xp.sum(xp.astype(new, xp.int64), axis=-1, keepdims=True) < 2 * surplus - 1
    new = new | few
    return new[:, rows, None] | new[:, None, :] | remembered


def _match(costs: Array, surplus: Array) -> tuple[Array, Array, Array, Array]:
    """Choose disjoint pairs, as many as the surplus or as there are: a greedy matching, in parallel.

    Rounds of mutual nearest neighbours among those not yet in a pair. The costs are computed once: a cluster that
    merged does not merge again before they are computed anew.

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
        Of those in no pair, the nearest other in no pair; -1 where there is none.
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
    partners, least = [], []
    for part in pieces(costs.shape[1], costs.shape[0] * costs.shape[1], costs):
        open_costs = costs[:, part, :] + penalty[:, None, :]
        partner = xp.argmin(open_costs, axis=-1)
        partners.append(partner)
        least.append(xp.take_along_axis(open_costs, partner[:, :, None], axis=2)[:, :, 0])
    return concat(partners, axis=1), concat(least, axis=1)


def _merge(means: Means, partner: Array, keeps: Array, goes: Array) -> Means:
    """Merge every cluster that ``keeps`` with its partner; free the places of those that ``goes``."""
    xp = array_namespace(means.keys)
    counts = means.counts
    added = xp.where(keeps, _pick(counts, partner), xp.zeros_like(counts))
    total = counts + added
    wide = means.keys.dtype
    share = xp.astype(added, wide) / xp.astype(xp.where(total > 0, total, xp.ones_like(total)), wide)
    difference = _pick(means.keys, partner) - means.keys
    apart = band_means(difference * difference)
    return Means(
        keys=means.keys + difference * share[:, :, None],
        values=means.values + (_pick(means.values, partner) - means.values) * share[:, :, None],
        counts=xp.where(goes, xp.zeros_like(counts), total),
        # The parallel-axis rule.
        spread=means.spread
        + share[:, :, None] * (_pick(means.spread, partner) - means.spread + (1.0 - share)[:, :, None] * apart),
        importance=xp.where(keeps, means.importance + _pick(means.importance, partner), means.importance),
        leaders=means.leaders,
        nearest=means.nearest,
    )


def _pick(x: Array, places: Array) -> Array:
    """Take places of each stream: ``(streams, clusters, ...)`` by int64 ``(streams, m)``."""
    xp = array_namespace(x)
    return xp.take_along_axis(x, places if x.ndim == 2 else places[:, :, None], axis=1)
