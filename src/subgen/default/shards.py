"""Merge sketches: the state of the default sketch for one stream after another, from those of the two.

The sinks are those of the first, the window is that of the second. What lies between, the window of the first and the
sinks of the second, becomes clusters of one. These and the clusters of the second are absorbed into those of the first
like tokens that leave the window.
"""

from __future__ import annotations

from dataclasses import replace

from .._array import Array, array_namespace, clip, compute_dtype, positions
from .._random import slot_draws
from .._tree import concat, tree_map
from .absorb import Tokens, places_behind, store, upcast_clusters
from .algorithm import RESIDUAL_DRAWS, ClusterMeans, early_weight
from .merging import merge_closest, singletons
from .metric import key_dissimilarity, mean_direction, query_second_moment, value_scale
from .quantization import draw_dithers
from .residual import join_samples
from .state import BufferOwner, Clusters, Residual, State, copied
from .threshold import join_leaders

__all__ = ["merge_states"]

# Purpose of the draws; those of `subgen.default.algorithm` and `subgen.paper.shards` are others.
_RESIDUAL_CHOICES = 10
# Clusters are absorbed an eighth of those held at a time, or as many as tokens are: a compromise of time and error.
_AT_ONCE = 8


def merge_states(method: ClusterMeans, first: State, second: State, heads: Array) -> State:
    """Merge the states of two streams, the second after the first.

    Parameters
    ----------
    method : ClusterMeans
        That of the first, which draws by its seed.
    first, second : State
    heads : int64 array, shape (streams,)
        See `subgen.default.algorithm.ClusterMeans.update`.

    Returns
    -------
    State
    """
    if second.n_seen == second.exact.n:
        return _replay(method, first, second, heads)
    xp, sink = array_namespace(first.exact.keys), method.sink
    wide, dtype = compute_dtype(first.exact.keys), first.exact.keys.dtype
    # What is exact now: sinks, tokens in between, window. The first may hold fewer tokens than there are sinks.
    before = tree_map(lambda x: x[:, : first.exact.n, ...], first.exact)
    exact = concat([before, second.exact], axis=1)
    end = first.exact.n + sink
    between = tree_map(lambda x: x[:, sink:end, ...], exact)
    window = tree_map(lambda x: x[:, end : end + second.exact.n - sink, ...], exact)
    kept = tree_map(lambda x: xp.concat([x[:, :sink, ...], x[:, end:, ...]], axis=1), exact)

    # Importance changes, and with it every cost: all clusters are compared again.
    held, other = (replace(upcast_clusters(state.clusters, wide), nearest=None) for state in (first, second))
    keys, values, recent_keys, recent_values = (
        xp.astype(x, wide, copy=False) for x in (between.keys, between.values, window.keys, window.values)
    )
    every = concat([held, other], axis=1)
    mean = mean_direction(xp.concat([keys, recent_keys], axis=1), every.keys, xp.astype(every.counts, wide))
    capacity = first.exact.capacity
    importance = key_dissimilarity(keys, *mean) * early_weight(max(first.n_seen, capacity))
    tokens = singletons(keys, values, importance, None if method.delta is None else between.keys)
    later = replace(other, importance=_importance(other, mean, first.n_seen, second.n_seen, capacity))
    n_seen = first.n_seen + second.n_seen
    merged, places = _absorb(
        method,
        held,
        concat([tokens, later], axis=1),
        query_second_moment(window.keys, window.queries, method.scale),
        value_scale(recent_values),
        method.max_clusters(second, n_seen),
    )
    residual = None
    if first.residual is not None and second.residual is not None:
        absorbed = first.n_seen - first.exact.n, second.n_seen - second.exact.n
        number = sum(absorbed) + keys.shape[1]
        drawn = tuple(
            _draw(method, purpose, number, first.residual, heads) for purpose in (_RESIDUAL_CHOICES, RESIDUAL_DRAWS)
        )
        residual = join_samples(
            first.residual,
            second.residual,
            between.keys,
            between.values,
            absorbed,
            held.counts.shape[1],
            places,
            (drawn[0], drawn[1]),
        )
    (dithers,) = draw_dithers(method.seed, [n_seen])
    clusters = store(merged, dtype, dithers, method.storage == "int8", padded=method.delta is not None)
    n = second.exact.n
    return method.with_cache(State(clusters, replace(kept, n=n, owner=BufferOwner(n)), residual, n_seen))


def _importance(other: Clusters, mean: tuple[Array, Array], before: int, n: int, capacity: int) -> Array:
    """Compute the importance of the clusters of a stream once others come before it: ``(streams, clusters)``.

    That of a single token is what it would be in one stream. That of several is multiplied by
    ``sqrt(p / (before + p))``, with p the tokens of its own stream seen when it was absorbed. Clusters keep the order
    in which they came, so p is about the members up to its own, and the ``capacity`` exact tokens.
    """
    xp = array_namespace(other.keys)
    seen = xp.cumulative_sum(xp.astype(other.counts, xp.int64), axis=1) + capacity
    seen = xp.astype(clip(seen, None, n), other.keys.dtype)
    token = key_dissimilarity(other.keys, *mean) * early_weight(seen + before)
    return xp.where(other.counts == 1, token, other.importance * xp.sqrt(seen / (seen + before)))


def _absorb(
    method: ClusterMeans, held: Clusters, more: Clusters, metric: Array, unit: Array, max_clusters: int | None
) -> tuple[Clusters, Array]:
    """Absorb clusters in the order in which they came, a few at a time, like tokens that leave the window.

    If all merged at once, the last ones would never be recent (docs/experiments.md).

    Parameters
    ----------
    method : ClusterMeans
    held, more : Clusters
    metric, unit
        See `subgen.default.merging.ward_costs`.
    max_clusters : int or None
        Clusters that may be left; ``None``: any number.

    Returns
    -------
    clusters : Clusters
    places : int64 array, shape (streams, places of ``held`` and ``more``)
        The place of each now.
    """
    xp = array_namespace(held.keys)
    places = xp.broadcast_to(positions(held.counts.shape[1], held.keys)[None, :], held.counts.shape)
    start, total = 0, more.counts.shape[1]
    while start < total:
        n_held = held.counts.shape[1]
        part = slice(start, min(total, start + max(method.block, n_held // _AT_ONCE)))
        if method.delta is None:
            pool, joined = concat([held, more.part(part)], axis=1), places_behind(held.counts, part.stop - start)
        else:
            pool, joined = join_leaders(held, more.part(part), method.delta)
        left = pool.counts.shape[1] if max_clusters is None else min(pool.counts.shape[1], max_clusters)
        held, assignment = merge_closest(pool, metric, unit, left, left)
        # Free places have no counterpart.
        places = clip(xp.take_along_axis(assignment, xp.concat([places, joined], axis=1), axis=1), None, left - 1)
        start = part.stop
    return held, places


def _draw(method: ClusterMeans, purpose: int, number: int, residual: Residual, heads: Array) -> Array:
    xp = array_namespace(residual.due)
    slots = positions(residual.due.shape[1], residual.due)[None, :]
    return slot_draws(method.seed, purpose, heads, slots, xp.zeros_like(slots) + number)


def _replay(method: ClusterMeans, state: State, second: State, heads: Array) -> State:
    """Append the tokens of a stream that are all exact, with their queries."""
    state, n, start = copied(state, state.exact.n), second.exact.n, 0
    tokens = Tokens(second.exact.keys, second.exact.values, second.exact.queries).part(slice(n))
    while start < n:
        state, part = method.append_some(state, tokens, start, heads)
        start = part.stop
    return state
