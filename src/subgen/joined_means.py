"""The state of the default sketch for one stream after another, from those of the two.

The sinks are those of the first, the window is that of the second. What lies between, the window of the first and the
sinks of the second, becomes clusters of one; with the clusters of both it merges down to the budget, as tokens do that
leave the window.
"""

from __future__ import annotations

from dataclasses import replace

from ._array import Array, array_namespace, chunks, compute_dtype, positions
from .absorbing import value_scale
from .backends import Operations
from .counter import draws, stream_key
from .means import RESIDUAL_DRAWS, ClusterMeans, MeansState, early_weight, own_copy
from .merging import Means, clusters_of_one, join, n_live
from .metric import typical_direction, unusualness
from .residual import Residual, join_samples
from .rounding import Codes

__all__ = ["join_means"]

# What is drawn, told apart from the draws of `subgen.means` and `subgen.joined_paper`.
_RESIDUAL_CHOICES = 10
# Share of the clusters that merge before costs are computed anew.
_STEP = 1 / 8
# Costs of pairs held at once (numbers, not bytes).
_COSTS_AT_ONCE = 1 << 23


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
    held, other = method.means(first, wide), method.means(second, wide)
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
    pool, joined = method.pool(join(held, join(tokens, later)), held.counts.shape[1], ops)
    most = method.most(second, n_seen, pool.counts.shape[1])
    merged, moved = _merge_gently(pool, method.metric(second, ops), value_scale(recent_values), most, ops)
    residual = None
    if first.residual is not None and second.residual is not None:
        absorbed = first.n_seen - first.n_exact, second.n_seen - second.n_exact
        number = sum(absorbed) + keys.shape[1]
        choices, due = (
            _drawn(method, purpose, number, first.residual, heads, ops)
            for purpose in (_RESIDUAL_CHOICES, RESIDUAL_DRAWS)
        )
        residual = join_samples(
            first.residual, second.residual, between_keys, between_values, absorbed, joined, moved, (choices, due)
        )
    state = replace(second, n_seen=n_seen, residual=residual)
    keys, values = (xp.concat(x, axis=1) for x in ([sink_keys, window_keys], [sink_values, window_values]))
    return method.rebuild(state, merged, keys, values, 0, ops)


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
    seen = xp.astype(xp.clip(seen, max=n), other.keys.dtype)
    token = unusualness(other.keys, *typical) * early_weight(seen + before)
    return xp.where(other.counts == 1, token, other.importance * xp.sqrt(seen / (seen + before)))


def _merge_gently(pool: Means, metric: Array, value_scale: Array, most: int, ops: Operations) -> tuple[Means, Array]:
    """Merge down to a number of clusters in steps, a few streams at a time; see `subgen.merging.merge_closest`.

    At once, so many would have to merge that unusual clusters could not wait (docs/experiments.md).
    """
    xp = array_namespace(pool.keys)
    streams, places = pool.counts.shape
    pieces = []
    for part in chunks(streams, max(1, _COSTS_AT_ONCE // places**2)):
        means = Means(*(None if x is None else x[part, ...] for x in pool.arrays()))
        moved = xp.broadcast_to(positions(places, means.keys)[None, :], means.counts.shape)
        left = max(most, int(xp.max(n_live(means))))
        while True:
            means, step = ops.merge_closest(means, metric[part, ...], value_scale[part], left, left)
            # Places that are free lead nowhere.
            moved = xp.clip(xp.take_along_axis(step, moved, axis=1), max=left - 1)
            if left == most:
                break
            left = max(most, left - max(1, int(_STEP * left)))
        pieces.append((means, moved))
    if len(pieces) == 1:
        return pieces[0]
    arrays = zip(*(means.arrays() for means, _ in pieces), strict=True)
    joined = Means(*(None if x[0] is None else xp.concat(list(x), axis=0) for x in arrays))
    return joined, xp.concat([moved for _, moved in pieces], axis=0)


def _drawn(method: ClusterMeans, purpose: int, number: int, like: Residual, heads: Array, ops: Operations) -> Array:
    xp = array_namespace(like.due)
    slots = positions(like.due.shape[1], like.due)[None, :]
    key0, key1 = stream_key(method.seed, purpose, heads, ops.threefry2x32)
    return draws((key0[:, None], key1[:, None]), slots, xp.zeros_like(slots) + number, ops.threefry2x32)


def _replay(method: ClusterMeans, state: MeansState, second: MeansState, heads: Array, ops: Operations) -> MeansState:
    """Append the tokens of a stream that are all exact, with their queries; its sinks have none."""
    state = own_copy(state)
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
            codes = Codes(second.queries.codes[:, mine, :], second.queries.scales[:, mine])
        state = method.append(state, second.keys[:, start:end, :], second.values[:, start:end, :], codes, ops)
        start = end
    return state
