"""The default sketch: exact sinks and recent tokens, and clusters merged to means, in fixed memory.

Data flow::

    tokens -> sinks (the first few, exact)
           -> ring (the last `window`, exact, each with one of its queries)
                  | full: the oldest half leaves
                  v
              clusters of one token  ->  closest pairs merge until `max_clusters` are left
                                         (distance and importance from the queries in the ring)

A cluster enters attention as one pair, its mean key and mean value, with the log-weight of `log_weights`. A cluster of
one is its token, exactly: rare tokens survive untouched and the crowd is merged.

Everything that decides is computed when the ring is full, from the same arrays whatever the cut of the stream, so
the state does not depend on how calls were cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ._array import Array, array_namespace, chunks, compute_dtype, positions
from .backends import Operations
from .merging import Means, band_means, bands, compact, join, merge_closest
from .rounding import round_to
from .weighted import causal_bias, join_rows, merge_attention

__all__ = ["ClusterMeans", "MeansState", "log_weights"]

# Logits held at once (numbers, not bytes).
_LOGITS_AT_ONCE = 1 << 22
# Added to the second moment of the queries, in units of its mean eigenvalue: a few dozen queries tell little about most
# directions, so the metric leans towards one that treats all alike (docs/experiments.md).
_RIDGE = 0.3
# Weight of a squared distance of values, in units of their typical norm, beside one of logits: keys that were merged
# wrongly are mended by the spread, values are not.
_VALUE_WEIGHT = 2.0
# Attention a token is taken to have received at least, as a share of uniform attention.
_LEAST_ATTENTION = 1e-3


@dataclass(frozen=True)
class MeansState:
    """What the sketch holds.

    Attributes
    ----------
    sink_keys, sink_values : array, shape (streams, up to sink, dim)
        The first tokens.
    ring_keys, ring_values : array, shape (streams, up to window, dim)
        The most recent tokens.
    ring_queries : array, shape (streams, up to window, head_dim)
        One query of each token in the ring, scaled; the query heads of a group take turns.
    ring_has_query : bool array, shape (up to window,)
        Whether the token came with queries.
    keys, values, counts, spread, importance : array, shape (streams, clusters, ...)
        The clusters, see `subgen.merging.Means`. Keys and values in the dtype of the input.
    n_seen : int
        Tokens so far.
    """

    sink_keys: Array
    sink_values: Array
    ring_keys: Array
    ring_values: Array
    ring_queries: Array
    ring_has_query: Array
    keys: Array
    values: Array
    counts: Array
    spread: Array
    importance: Array
    n_seen: int


def log_weights(rows: Array, counts: Array, spread: Array) -> Array:
    """Log-weight of each cluster for each query: ``log n + min(variance / 2, log n)``.

    By Jensen's inequality a cluster has more mass than ``n e^<q, mean>``. To second order the missing factor is
    ``e^(Var<q,k> / 2)``. The variance of the members' logits is taken from their spread, which is told apart by bands
    of coordinates: ``sum over bands of spread |q_band|^2``. Far from the mean the second order overshoots; stopping it
    at a factor of n won in trials over fixed limits (docs/experiments.md).

    Parameters
    ----------
    rows : array, shape (streams, m, head_dim)
        Scaled queries.
    counts : array, shape (streams, clusters)
    spread : array, shape (streams, clusters, bands)

    Returns
    -------
    array, shape (streams, m, clusters)
        ``-inf`` where a place is free.
    """
    xp = array_namespace(rows)
    counts = xp.astype(counts, rows.dtype, copy=False)
    spread = xp.astype(spread, rows.dtype, copy=False)
    live = counts > 0
    log_counts = xp.log(xp.where(live, counts, xp.ones_like(counts)))[:, None, :]
    energy = band_means(rows * rows) * (rows.shape[-1] / spread.shape[-1])
    half = 0.5 * xp.matmul(energy, xp.matrix_transpose(spread))
    weights = log_counts + xp.where(half < log_counts, half, xp.broadcast_to(log_counts, half.shape))
    return xp.where(live[:, None, :], weights, xp.full_like(weights, -math.inf))


@dataclass(frozen=True)
class ClusterMeans:
    """The sketch and its parameters; all of its functions are pure.

    Parameters
    ----------
    max_clusters : int
    window : int
        Most recent tokens kept exactly: between half of this and all of it.
    sink : int
        First tokens kept exactly.
    scale : float or None
        Factor of the logits; ``None`` means ``head_dim ** -0.5``.
    seed : int
        In ``[0, 2**64)``.
    """

    max_clusters: int
    window: int
    sink: int
    scale: float | None
    seed: int

    @property
    def block(self) -> int:
        """Tokens that leave a full ring at once."""
        return max(1, self.window // 2)

    def init(self, keys: Array, values: Array) -> MeansState:
        """Return the empty state for streams like ``(streams, n, head_dim)`` and ``(streams, n, value_dim)``."""
        xp = array_namespace(keys)
        wide = compute_dtype(keys)
        scalars = xp.zeros((keys.shape[0], 0), dtype=wide, device=keys.device)
        no_keys, no_values = keys[:, :0, :], values[:, :0, :]
        return MeansState(
            sink_keys=no_keys,
            sink_values=no_values,
            ring_keys=no_keys,
            ring_values=no_values,
            ring_queries=no_keys,
            ring_has_query=xp.zeros((0,), dtype=xp.bool, device=keys.device),
            keys=no_keys,
            values=no_values,
            counts=scalars,
            spread=xp.zeros((keys.shape[0], 0, bands(keys.shape[-1])), dtype=wide, device=keys.device),
            importance=scalars,
            n_seen=0,
        )

    def n_clusters(self, state: MeansState) -> Array:
        """Count the live clusters: int64, shape (streams,)."""
        xp = array_namespace(state.counts)
        return xp.sum(xp.astype(state.counts > 0, xp.int64), axis=-1)

    def update(
        self, state: MeansState, keys: Array, values: Array, rows: Array | None, heads: Array, ops: Operations
    ) -> MeansState:
        """Absorb tokens.

        Parameters
        ----------
        state : MeansState
        keys, values : array, shape (streams, n, head_dim) and (streams, n, value_dim)
        rows : array, shape (streams, group, n, head_dim), or None
            Scaled queries of the tokens.
        heads : int64 array, shape (streams,)
            Unused: nothing here is drawn by head.
        ops : Operations

        Returns
        -------
        MeansState
        """
        start, n = 0, keys.shape[1]
        while start < n:
            state, part = self._take(state, keys, values, rows, start, ops)
            start = part.stop
        return state

    def step(
        self, state: MeansState, rows: Array, keys: Array, values: Array, heads: Array, ops: Operations
    ) -> tuple[MeansState, Array]:
        """Absorb tokens and answer each of them: as `update` and `attend` would, token by token.

        Parameters
        ----------
        state, rows, keys, values, heads, ops
            As in `update`.

        Returns
        -------
        state : MeansState
        outputs : array, shape (streams, group, n, value_dim)
        """
        xp = array_namespace(keys)
        streams, group, n, head_dim = rows.shape
        outputs, start = [], 0
        while start < n:
            state, part = self._take(state, keys, values, rows, start, ops)
            size = part.stop - part.start
            piece = xp.reshape(rows[:, :, part, :], (streams, group * size, head_dim))
            seen = state.sink_keys.shape[1] + state.ring_keys.shape[1]
            output, _ = _answer(state, piece, causal_bias(size, seen, group, piece), ops)
            outputs.append(xp.reshape(output, (streams, group, size, output.shape[-1])))
            start = part.stop
        return state, outputs[0] if len(outputs) == 1 else xp.concat(outputs, axis=2)

    def attend(self, state: MeansState, rows: Array, ops: Operations) -> tuple[Array, Array]:
        """Answer queries from the state.

        Parameters
        ----------
        state : MeansState
        rows : array, shape (streams, m, head_dim)
            Scaled.
        ops : Operations

        Returns
        -------
        outputs : array, shape (streams, m, value_dim)
        logsumexp : array, shape (streams, m)
        """
        xp = array_namespace(rows)
        exact = state.sink_keys.shape[1] + state.ring_keys.shape[1]
        nothing = xp.zeros((1, 1, exact), dtype=rows.dtype, device=rows.device)
        size = max(1, _LOGITS_AT_ONCE // (rows.shape[0] * (exact + state.keys.shape[1])))
        pieces = [_answer(state, rows[:, part, :], nothing, ops) for part in chunks(rows.shape[1], size)]
        return join_rows(pieces)

    def _take(
        self, state: MeansState, keys: Array, values: Array, rows: Array | None, start: int, ops: Operations
    ) -> tuple[MeansState, slice]:
        """Take as many tokens as fit, making room first; return them as a slice."""
        xp = array_namespace(keys)
        n = keys.shape[1]
        room = self.sink - state.sink_keys.shape[1]
        if room > 0:
            part = slice(start, min(n, start + room))
            return replace(
                state,
                sink_keys=xp.concat([state.sink_keys, keys[:, part, :]], axis=1),
                sink_values=xp.concat([state.sink_values, values[:, part, :]], axis=1),
                n_seen=state.n_seen + part.stop - start,
            ), part
        # Room is made when the next token comes, not when the ring fills: whatever the cut, at the same token.
        if state.ring_keys.shape[1] == self.window:
            state = self._absorb(state, ops)
        part = slice(start, min(n, start + self.window - state.ring_keys.shape[1]))
        size = part.stop - start
        if rows is None:
            queries = xp.zeros_like(keys[:, part, :])
        else:
            turn = (positions(size, keys) + state.n_seen) % rows.shape[1]
            queries = xp.take_along_axis(rows[:, :, part, :], turn[None, None, :, None], axis=1)[:, 0, :, :]
            queries = xp.astype(queries, keys.dtype, copy=False)
        told = xp.full((size,), rows is not None, dtype=xp.bool, device=keys.device)
        return replace(
            state,
            ring_keys=xp.concat([state.ring_keys, keys[:, part, :]], axis=1),
            ring_values=xp.concat([state.ring_values, values[:, part, :]], axis=1),
            ring_queries=xp.concat([state.ring_queries, queries], axis=1),
            ring_has_query=xp.concat([state.ring_has_query, told]),
            n_seen=state.n_seen + size,
        ), part

    def _absorb(self, state: MeansState, ops: Operations) -> MeansState:
        """Move the oldest half of a full ring into the clusters."""
        xp = array_namespace(state.ring_keys)
        wide = compute_dtype(state.ring_keys)
        block = self.block
        leaving_keys = xp.astype(state.ring_keys[:, :block, :], wide)
        leaving_values = xp.astype(state.ring_values[:, :block, :], wide)
        ones = xp.ones(leaving_keys.shape[:2], dtype=wide, device=leaving_keys.device)
        if bool(xp.any(state.ring_has_query)):
            importance = xp.sqrt(_attention_received(state, block, ops) + _LEAST_ATTENTION / state.n_seen)
            metric = _second_moment(state.ring_queries, state.ring_has_query, wide)
        else:
            importance = ones
            metric = _isotropic(state.ring_keys, self.scale, wide)
        alone = xp.zeros_like(leaving_keys[:, :, : bands(leaving_keys.shape[-1])])
        leaving = Means(leaving_keys, leaving_values, ones, alone, importance)
        held = Means(
            xp.astype(state.keys, wide, copy=False),
            xp.astype(state.values, wide, copy=False),
            state.counts,
            state.spread,
            state.importance,
        )
        ring_values = xp.astype(state.ring_values, wide, copy=False)
        norms = xp.sqrt(xp.sum(ring_values * ring_values, axis=-1))
        value_scale = xp.mean(norms, axis=-1) / math.sqrt(_VALUE_WEIGHT)
        value_scale = xp.where(value_scale > 0, value_scale, xp.ones_like(value_scale))
        places = min(self.max_clusters, state.keys.shape[1] + block)
        merged = merge_closest(join(held, leaving), metric, value_scale, self.max_clusters)
        merged = compact(merged, places)
        return replace(
            state,
            ring_keys=state.ring_keys[:, block:, :],
            ring_values=state.ring_values[:, block:, :],
            ring_queries=state.ring_queries[:, block:, :],
            ring_has_query=state.ring_has_query[block:],
            keys=round_to(merged.keys, state.keys.dtype, self.seed, state.n_seen, ops),
            values=round_to(merged.values, state.values.dtype, self.seed, state.n_seen + 1, ops),
            counts=merged.counts,
            spread=merged.spread,
            importance=merged.importance,
        )


def _answer(state: MeansState, rows: Array, exact_bias: Array, ops: Operations) -> tuple[Array, Array]:
    """Outputs and logsumexp over the sinks, the ring and the clusters."""
    xp = array_namespace(rows)
    keys = xp.concat([state.sink_keys, state.ring_keys], axis=1)
    values = xp.concat([state.sink_values, state.ring_values], axis=1)
    answer: tuple[Array, Array] = ops.weighted_attention(rows, keys, values, exact_bias)
    if state.keys.shape[1]:
        weights = log_weights(rows, state.counts, state.spread)
        answer = merge_attention(answer, ops.weighted_attention(rows, state.keys, state.values, weights))
    return answer


def _attention_received(state: MeansState, block: int, ops: Operations) -> Array:
    """Mean attention that the oldest tokens of the ring received from the queries in it: ``(streams, block)``."""
    xp = array_namespace(state.ring_keys)
    wide = compute_dtype(state.ring_keys)
    rows = xp.astype(state.ring_queries, wide, copy=False)
    window = rows.shape[1]
    seen = state.sink_keys.shape[1] + window
    bias = causal_bias(window, seen, 1, rows)
    _, total = _answer(state, rows, bias, ops)
    keys = xp.astype(state.ring_keys[:, :block, :], wide, copy=False)
    logits = xp.matmul(rows, xp.matrix_transpose(keys))
    token = positions(window, rows)
    asks = (token[:, None] >= token[None, :block]) & state.ring_has_query[:, None]
    # Masked before the exponential: what a query must not see may overflow it.
    logits = xp.where(asks[None, :, :], logits - total[:, :, None], xp.full_like(logits, -math.inf))
    received = xp.sum(xp.exp(logits), axis=1)
    asked = xp.sum(xp.astype(asks, wide), axis=0)
    return received / xp.where(asked > 0, asked, xp.ones_like(asked))[None, :]


def _second_moment(queries: Array, told: Array, wide: object) -> Array:
    """Second moment of the queries in the ring, with a ridge: ``(streams, head_dim, head_dim)``."""
    xp = array_namespace(queries)
    rows = xp.astype(queries, wide, copy=False)  # zeros where a token came without
    moment = xp.matmul(xp.matrix_transpose(rows), rows) / xp.sum(xp.astype(told, rows.dtype))
    return moment + _RIDGE * _mean_eigenvalue(moment) * _identity(rows)


def _isotropic(keys: Array, scale: float | None, wide: object) -> Array:
    """Second moment of queries that nobody has shown: as long as the keys, in every direction alike."""
    xp = array_namespace(keys)
    rows = xp.astype(keys, wide, copy=False)
    head_dim = rows.shape[-1]
    factor = 1.0 / head_dim if scale is None else scale * scale
    moment = xp.mean(rows * rows, axis=(1, 2), keepdims=True)
    moment = xp.where(moment > 0, moment, xp.ones_like(moment))
    return factor * moment * _identity(rows)


def _mean_eigenvalue(moment: Array) -> Array:
    xp = array_namespace(moment)
    identity = _identity(moment)
    value = xp.sum(moment * identity, axis=(1, 2), keepdims=True) / moment.shape[-1]
    return xp.where(value > 0, value, xp.ones_like(value))


def _identity(like: Array) -> Array:
    xp = array_namespace(like)
    return xp.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None, :, :]
