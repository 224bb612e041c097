"""The state of the default sketch for one stream after another, from those of the two.

The sinks are those of the first, the window is that of the second. What lies between, the window of the first and the
sinks of the second, becomes clusters of one. These and the clusters of the second are absorbed into those of the first
as tokens are that leave the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ._array import Array, array_namespace, clip, compute_dtype, positions
from .absorbing import Exact, value_scale
from .backends import Operations
from .counter import slot_draws
from .means import RESIDUAL_DRAWS, ClusterMeans, MeansState, early_weight, own_copy
from .merging import Means, clusters_of_one, join
from .metric import typical_direction, unusualness
from .residual import Residual, join_samples

__all__ = ["join_means"]

# What is drawn, told apart from the draws of `subgen.means` and `subgen.joined_paper`.
_RESIDUAL_CHOICES = 10
# Clusters are absorbed an eighth of those held at a time, or as many as tokens are: time and error in between.
_AT_ONCE = 8


def join_means(
    method: ClusterMeans, first: MeansState, second: MeansState, heads: Array, ops: Operations
) -> MeansState:
    """Join the states of two streams, the second after the first.

    Parameters
    ----------
    method : ClusterMeans
        That of the first, which draws by its seed.
    first, second : MeansState
    heads : int64 array, shape (streams,)
        See `subgen.method.Method.update`.
    ops : Operations

    Returns
    -------
    MeansState
    """
    if second.n_seen == second.n_exact:
        return _replay(method, first, second, heads, ops)
    xp = array_namespace(first.keys)
    wide = compute_dtype(first.keys)
    sink_keys, between_keys, window_keys = _cut(method, first, second, first.keys, second.keys)
    sink_values, between_values, window_values = _cut(method, first, second, first.values, second.values)
    # Importance changes, and with it every cost: all are compared anew.
    held, other = (replace(method.means(state, wide), nearest=None) for state in (first, second))
    recent_keys, recent_values = (
        xp.astype(x[:, : len(second.asked), :], wide, copy=False) for x in (window_keys, window_values)
    )

    keys, values = (xp.astype(x, wide, copy=False) for x in (between_keys, between_values))
    every = join(held, other)
    typical = typical_direction(xp.concat([keys, recent_keys], axis=1), every.keys, xp.astype(every.counts, wide))
    full = method.sink + method.window
    tokens = clusters_of_one(
        keys,
        values,
        unusualness(keys, *typical) * early_weight(max(first.n_seen, full)),
        None if method.delta is None else between_keys,
    )
    later = replace(other, importance=_importance(other, typical, first.n_seen, second.n_seen, full))
    n_seen = first.n_seen + second.n_seen
    merged, places = _absorb(
        method,
        held,
        join(tokens, later),
        method.metric(second, ops),
        value_scale(recent_values),
        lambda pool: method.most(second, n_seen, pool),
        ops,
    )
    residual = None
    if first.residual is not None and second.residual is not None:
        absorbed = first.n_seen - first.n_exact, second.n_seen - second.n_exact
        number = sum(absorbed) + keys.shape[1]
        choices, due = (
            _drawn(method, purpose, number, first.residual, heads, ops)
            for purpose in (_RESIDUAL_CHOICES, RESIDUAL_DRAWS)
        )
        residual = join_samples(
            first.residual,
            second.residual,
            between_keys,
            between_values,
            absorbed,
            held.counts.shape[1],
            places,
            (choices, due),
        )
    state = replace(second, n_seen=n_seen, residual=residual)
    keys, values = (xp.concat(x, axis=1) for x in ([sink_keys, window_keys], [sink_values, window_values]))
    return method.rebuild(state, merged, Exact(keys, values, second.queries, second.asked), 0, ops)


def _cut(method: ClusterMeans, first: MeansState, second: MeansState, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Cut the exact tokens of both into the sinks, those between, and the window with the room behind it."""
    xp = array_namespace(x)
    window = second.n_means + method.sink
    exact = xp.concat(
        [x[:, first.n_means : first.n_means + first.n_exact, :], y[:, second.n_means : window, :]], axis=1
    )
    return exact[:, : method.sink, :], exact[:, method.sink :, :], y[:, window:, :]


def _importance(other: Means, typical: tuple[Array, Array], before: int, n: int, full: int) -> Array:
    """Importance of the clusters of a stream of n tokens once others came before it: ``(streams, clusters)``.

    Of a token it is what it would be in one stream; of several, what it was times ``sqrt(p / (before + p))``, with p
    the tokens of its own stream seen when it was absorbed. Clusters keep the order in which they came, so that is about
    the members up to its own, and the ``full`` sinks and window.
    """
    xp = array_namespace(other.keys)
    seen = xp.cumulative_sum(xp.astype(other.counts, xp.int64), axis=1) + full
    seen = xp.astype(clip(seen, None, n), other.keys.dtype)
    token = unusualness(other.keys, *typical) * early_weight(seen + before)
    return xp.where(other.counts == 1, token, other.importance * xp.sqrt(seen / (seen + before)))


def _absorb(
    method: ClusterMeans,
    held: Means,
    more: Means,
    metric: Array,
    value_scale: Array,
    most: Callable[[int], int],
    ops: Operations,
) -> tuple[Means, Array]:
    """Absorb clusters in the order in which they came, a few at a time, as tokens that leave the window.

    Were all to merge at once, there would be no time when the last ones have only just come (docs/experiments.md).

    Parameters
    ----------
    method : ClusterMeans
    held, more : Means
    metric, value_scale
        See `subgen.merging.ward_costs`.
    most : callable
        How many clusters may be left of a number of places.
    ops : Operations

    Returns
    -------
    means : Means
    places : int64 array, shape (streams, places of ``held`` and ``more``)
        The place of each now.
    """
    xp = array_namespace(held.keys)
    places = xp.broadcast_to(positions(held.counts.shape[1], held.keys)[None, :], held.counts.shape)
    start, total = 0, more.counts.shape[1]
    while start < total:
        part = slice(start, min(total, start + max(method.block, held.counts.shape[1] // _AT_ONCE)))
        pool, joined = method.pool(join(held, more.part(part)), held.counts.shape[1], ops)
        left = most(pool.counts.shape[1])
        held, moved = ops.merge_closest(pool, metric, value_scale, left, left)
        # Places that were free lead nowhere.
        places = clip(xp.take_along_axis(moved, xp.concat([places, joined], axis=1), axis=1), None, left - 1)
        start = part.stop
    return held, places


def _drawn(method: ClusterMeans, purpose: int, number: int, like: Residual, heads: Array, ops: Operations) -> Array:
    xp = array_namespace(like.due)
    slots = positions(like.due.shape[1], like.due)[None, :]
    return slot_draws(method.seed, purpose, heads, slots, xp.zeros_like(slots) + number, ops.threefry2x32)


def _replay(method: ClusterMeans, state: MeansState, second: MeansState, heads: Array, ops: Operations) -> MeansState:
    """Append the tokens of a stream that are all exact, with their queries; its sinks have none."""
    state = own_copy(state, state.n_exact)
    window = second.n_exact - len(second.asked)
    asked = (False,) * window + second.asked
    start, n = 0, second.n_exact
    while start < n:
        state = method.make_room(state, heads, ops)
        # As many as fit, all with queries or all without.
        end = start + 1
        most = min(n, start + method.sink + method.window - state.n_exact)
        while end < most and asked[end] == asked[start]:
            end += 1
        codes = None
        if asked[start]:
            # What becomes a sink keeps no query.
            skip = min(end - start, max(0, method.sink - state.n_exact))
            mine = slice(start + skip - window, end - window)
            codes = second.queries.part(mine)
        state = method.append(state, second.keys[:, start:end, :], second.values[:, start:end, :], codes, ops)
        start = end
    return state
