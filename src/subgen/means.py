"""The default sketch: exact sinks and recent tokens, and clusters merged to means.

Data flow::

    tokens -> sinks (the first few, exact)
           -> window (the last ones, exact, each with one of its queries)
                  | full: the oldest half leaves
                  v
              clusters of one token  ->  closest pairs merge until the budget is met
                                         (distance from the queries in the window; unusual keys last)
              or, with delta, tokens  ->  join the cluster of a leader within delta, or open one

A cluster enters attention as one pair, its mean key and mean value, with the log-weight of `subgen.mass.log_weights`.
A cluster of one is its token, exactly: rare tokens survive untouched and the crowd is merged.

Everything that decides is computed when the window is full, from the same arrays whatever the cut of the stream, so
the state does not depend on how calls were cut.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

from ._array import Array, array_namespace, chunks, compute_dtype, itemsize, positions
from .backends import Operations
from .budget import Budget, Footprint
from .clustering import room_for
from .counter import stream_key
from .leaders import join_leaders
from .merging import Means, bands, clusters_of_one, join, n_live
from .metric import isotropic_moment, second_moment, typical_direction, unusualness
from .residual import Residual, correct, empty_residual, sample_tokens
from .rounding import Codes, Dither, dequantize, dither, quantize, round_to
from .tail import Tail
from .weighted import join_rows, merge_attention

__all__ = [
    "RESIDUAL_DRAWS",
    "ClusterMeans",
    "MeansState",
    "Storage",
    "clear_room",
    "early_weight",
    "own_copy",
    "value_scale",
]

Storage = Literal["input", "int8"]

# Logits held at once (numbers, not bytes).
_LOGITS_AT_ONCE = 1 << 22
# Weight of a squared distance of values, in units of their typical norm, beside one of logits: keys that were merged
# wrongly are mended by the spread, values are not.
_VALUE_WEIGHT = 3.0
# Importance falls with the root of the position, from 1 here: what came early was merged in a smaller crowd, and later
# answers depend on it as much (docs/experiments.md).
_EARLY = 1000.0
# What is drawn, told apart; 1 and 2 are the reservoirs of `subgen.paper`.
_KEYS, _VALUES, _SPREAD, _IMPORTANCE, RESIDUAL_DRAWS = 3, 4, 5, 6, 7


@dataclass(frozen=True)
class MeansState:
    """What the sketch holds.

    Attributes
    ----------
    keys, values : array, shape (streams, clusters + sink + window, dim)
        Means of the clusters, then the exact tokens in their order, then room; in the dtype of the input. With
        ``storage="int8"`` no means.
    n_exact : int
        Exact tokens: sinks first, then the window.
    n_seen : int
        Tokens so far.
    counts : int32 array, shape (streams, clusters)
    spread, importance : array, shape (streams, clusters, bands) and (streams, clusters)
        See `subgen.merging.Means`; in the dtype of the input.
    key_codes, value_codes : Codes or None
        The means, with ``storage="int8"``.
    leaders : array, shape (streams, clusters, head_dim), or None
        See `subgen.leaders`; with ``delta``.
    queries : Codes, of shape (streams, window, head_dim)
        One query of each token in the window, scaled; the query heads of a group take turns.
    asked : tuple of bool
        Whether each token in the window came with queries.
    residual : Residual or None
        See `subgen.residual`.
    tail : Tail
        Who may write into the room.
    """

    keys: Array
    values: Array
    n_exact: int
    n_seen: int
    counts: Array
    spread: Array
    importance: Array
    key_codes: Codes | None
    value_codes: Codes | None
    leaders: Array | None
    queries: Codes
    asked: tuple[bool, ...]
    residual: Residual | None
    tail: Tail

    @property
    def n_means(self) -> int:
        """Places of clusters in ``keys`` and ``values``."""
        return 0 if self.key_codes is not None else int(self.counts.shape[1])


@dataclass(frozen=True)
class ClusterMeans:
    """The sketch and its parameters; all of its functions are pure.

    Parameters
    ----------
    budget : Budget or None
        Clusters held; ``None`` if only ``delta`` bounds them.
    delta : float or None
        Radius of a cluster, in the units of the keys; ``None`` merges closest pairs.
    window : int
        Most recent tokens kept exactly: between half of this and all of it.
    sink : int
        First tokens kept exactly.
    scale : float or None
        Factor of the logits; ``None`` means ``head_dim ** -0.5``.
    storage : {"input", "int8"}
        What means are held in: the dtype of the input, or 8 bits.
    residual_samples : int
        Slots of the corrected estimator.
    seed : int
        In ``[0, 2**64)``.
    """

    budget: Budget | None
    _: KW_ONLY
    window: int
    sink: int
    delta: float | None = None
    scale: float | None = None
    storage: Storage = "input"
    residual_samples: int = 0
    seed: int = 0

    @property
    def block(self) -> int:
        """Tokens that leave a full window at once."""
        return max(1, self.window // 2)

    def footprint(self, keys: Array, values: Array) -> Footprint:
        """Count the bytes of streams like ``(streams, n, head_dim)`` and ``(streams, n, value_dim)``."""
        xp = array_namespace(keys)
        d, e = keys.shape[-1], values.shape[-1]
        size = itemsize(keys.dtype, xp)
        pair = size * (d + e)
        mean = d + e + 2 * size if self.storage == "int8" else pair
        wide = itemsize(compute_dtype(keys), xp)
        return Footprint(
            streams=keys.shape[0],
            pair=pair,
            cluster=mean + 4 + size * (bands(d) + 1) + (0 if self.delta is None else size * d),
            fixed=pair * (self.sink + self.window) + (d + wide) * self.window + self.residual_samples * (pair + 4 + 8),
            window=self.window,
        )

    def init(self, keys: Array, values: Array) -> MeansState:
        """Return the empty state for streams like ``(streams, n, head_dim)`` and ``(streams, n, value_dim)``.

        Raises
        ------
        ValueError
            If the budget holds no cluster of this shape and dtype.
        """
        if self.budget is not None:
            self.budget.clusters(0, self.footprint(keys, values))
        xp = array_namespace(keys)
        wide = compute_dtype(keys)
        streams, d, e = keys.shape[0], keys.shape[-1], values.shape[-1]

        def zeros(*shape: int, dtype: object = keys.dtype) -> Array:
            return xp.zeros((streams, *shape), dtype=dtype, device=keys.device)

        coded = self.storage == "int8"
        return MeansState(
            keys=zeros(self.sink + self.window, d),
            values=zeros(self.sink + self.window, e),
            n_exact=0,
            n_seen=0,
            counts=zeros(0, dtype=xp.int32),
            spread=zeros(0, bands(d)),
            importance=zeros(0),
            key_codes=Codes(zeros(0, d, dtype=xp.int8), zeros(0)) if coded else None,
            value_codes=Codes(zeros(0, e, dtype=xp.int8), zeros(0)) if coded else None,
            leaders=None if self.delta is None else zeros(0, d),
            queries=Codes(zeros(self.window, d, dtype=xp.int8), zeros(self.window, dtype=wide)),
            asked=(),
            residual=empty_residual(keys, values, self.residual_samples) if self.residual_samples else None,
            tail=Tail(0),
        )

    def n_clusters(self, state: MeansState) -> Array:
        """Count the live clusters: int64, shape (streams,)."""
        xp = array_namespace(state.counts)
        return xp.sum(xp.astype(state.counts > 0, xp.int64), axis=-1)

    def update(
        self, state: MeansState, keys: Array, values: Array, rows: Array | None, heads: Array, ops: Operations
    ) -> MeansState:
        """Absorb tokens; see `subgen.method.Method.update`."""
        start, n = 0, keys.shape[1]
        while start < n:
            state, part = self._take(state, keys, values, rows, start, heads, ops)
            start = part.stop
        return state

    def step(
        self, state: MeansState, rows: Array, keys: Array, values: Array, heads: Array, ops: Operations
    ) -> tuple[MeansState, Array]:
        """Absorb tokens and answer each of them; see `subgen.method.Method.step`."""
        xp = array_namespace(keys)
        streams, group, n, head_dim = rows.shape
        outputs, start = [], 0
        while start < n:
            state, part = self._take(state, keys, values, rows, start, heads, ops)
            size = part.stop - part.start
            piece = xp.reshape(rows[:, :, part, :], (streams, group * size, head_dim))
            output, _ = _answer(state, piece, size, ops)
            outputs.append(xp.reshape(output, (streams, group, size, output.shape[-1])))
            start = part.stop
        return state, outputs[0] if len(outputs) == 1 else xp.concat(outputs, axis=2)

    def attend(self, state: MeansState, rows: Array, ops: Operations) -> tuple[Array, Array]:
        """Answer queries from the state; see `subgen.method.Method.attend`."""
        pairs = state.n_exact + state.counts.shape[1]
        size = max(1, _LOGITS_AT_ONCE // (rows.shape[0] * pairs))
        if rows.shape[1] <= size:
            return _answer(state, rows, 0, ops)
        return join_rows([_answer(state, rows[:, part, :], 0, ops) for part in chunks(rows.shape[1], size)])

    def attend_with_error(self, state: MeansState, rows: Array, ops: Operations) -> tuple[Array, Array, Array]:
        """Answer queries by the corrected estimator; see `subgen.residual.correct`.

        Returns
        -------
        outputs, error : array, shape (streams, m, value_dim)
        logsumexp : array, shape (streams, m)
        """
        xp = array_namespace(rows)
        residual = state.residual
        if residual is None:
            raise ValueError("this sketch keeps no residual sample")
        means = self.means(state, rows.dtype)
        numbers = rows.shape[0] * residual.keys.shape[1] * state.values.shape[-1]
        absorbed = state.n_seen - state.n_exact
        pieces = []
        for part in chunks(rows.shape[1], max(1, _LOGITS_AT_ONCE // numbers)):
            output, logsumexp = _answer(state, rows[:, part, :], 0, ops)
            if absorbed:
                pieces.append(correct(rows[:, part, :], output, logsumexp, means, residual, absorbed))
            else:
                pieces.append((output, xp.zeros_like(output), logsumexp))
        return tuple(xp.concat([piece[i] for piece in pieces], axis=1) for i in range(3))

    def _take(
        self,
        state: MeansState,
        keys: Array,
        values: Array,
        rows: Array | None,
        start: int,
        heads: Array,
        ops: Operations,
    ) -> tuple[MeansState, slice]:
        """Take as many tokens as fit, making room first; return them as a slice."""
        state = self.make_room(state, heads, ops)
        filled = state.n_exact
        size = min(keys.shape[1] - start, self.sink + self.window - filled)
        part = slice(start, start + size)
        codes = None
        skip = max(0, self.sink - filled)  # sinks, which keep no query
        if rows is not None and size > skip:
            mine = rows[:, :, start + skip : part.stop, :]
            codes = ops.quantize(_turns(mine, state.n_seen + skip), state.queries.scales.dtype)
        return self.append(state, keys[:, part, :], values[:, part, :], codes, ops), part

    def make_room(self, state: MeansState, heads: Array, ops: Operations) -> MeansState:
        """Absorb the oldest half of the window if it is full, as the next token needs it.

        Room is made when a token comes, not when the window fills: whatever the cut, at the same token.
        """
        return self._absorb(state, heads, ops) if state.n_exact == self.sink + self.window else state

    def append(self, state: MeansState, keys: Array, values: Array, codes: Codes | None, ops: Operations) -> MeansState:
        """Append tokens that fit behind the exact ones.

        Parameters
        ----------
        state
        keys, values : array, shape (streams, n, dim)
            No more than there is room for.
        codes : Codes or None
            A query of each of them that is no sink.
        ops : Operations

        Returns
        -------
        MeansState
        """
        size, filled = keys.shape[1], state.n_exact
        if not state.tail.claim(filled, filled + size):
            state = own_copy(state, filled + size)
        place = state.n_means + filled
        new_keys = ops.write(state.keys, place, keys)
        new_values = ops.write(state.values, place, values)
        queries, asked = state.queries, state.asked
        skip = max(0, self.sink - filled)
        if size > skip:
            asked = asked + (codes is not None,) * (size - skip)
            if codes is not None:
                queries = Codes(
                    ops.write(queries.codes, filled + skip - self.sink, codes.codes),
                    ops.write(queries.scales, filled + skip - self.sink, codes.scales),
                )
        return replace(
            state,
            keys=new_keys,
            values=new_values,
            n_exact=filled + size,
            n_seen=state.n_seen + size,
            queries=queries,
            asked=asked,
        )

    def _absorb(self, state: MeansState, heads: Array, ops: Operations) -> MeansState:
        """Move the oldest half of a full window into the clusters."""
        xp = array_namespace(state.keys)
        wide = compute_dtype(state.keys)
        sinks = slice(state.n_means, state.n_means + self.sink)
        leaves = slice(sinks.stop, sinks.stop + self.block)
        window_keys = xp.astype(state.keys[:, sinks.stop :, :], wide, copy=False)
        window_values = xp.astype(state.values[:, sinks.stop :, :], wide, copy=False)
        held = self.means(state, wide)
        tokens = window_keys[:, : self.block, :]
        typical = typical_direction(window_keys, held.keys, xp.astype(held.counts, wide))
        leaving = clusters_of_one(
            tokens,
            window_values[:, : self.block, :],
            unusualness(tokens, *typical) * early_weight(state.n_seen),
            None if self.delta is None else state.keys[:, leaves, :],
        )
        pool, joined = self.pool(held, leaving, ops)
        most = self.most(state, state.n_seen, pool.counts.shape[1])
        merged, moved = ops.merge_closest(pool, self.metric(state), value_scale(window_values), most, most)
        residual = state.residual
        if residual is not None:
            key = stream_key(self.seed, RESIDUAL_DRAWS, heads, ops.threefry2x32)
            offered = state.n_seen - self.sink - self.window
            residual = sample_tokens(
                residual, state.keys[:, leaves, :], state.values[:, leaves, :], joined, moved, offered, key, ops
            )

        def left(x: Array) -> list[Array]:
            """Take out the tokens that leave, and leave as much room at the end."""
            return [x[:, sinks, :], x[:, leaves.stop :, :], xp.zeros_like(x[:, : self.block, :])]

        def moved_up(x: Array) -> Array:
            return xp.concat([x[:, self.block :, ...], xp.zeros_like(x[:, : self.block, ...])], axis=1)

        state = replace(
            state,
            n_exact=state.n_exact - self.block,
            queries=Codes(moved_up(state.queries.codes), moved_up(state.queries.scales)),
            asked=state.asked[self.block :],
            residual=residual,
        )
        return self.rebuild(state, merged, left(state.keys), left(state.values), ops)

    def metric(self, state: MeansState) -> Array:
        """Which differences of keys matter, by the queries in the window: ``(streams, head_dim, head_dim)``."""
        xp = array_namespace(state.keys)
        wide, asked = compute_dtype(state.keys), state.asked
        if not any(asked):
            first = state.n_means + self.sink
            window = state.keys[:, first : state.n_means + state.n_exact, :]
            return isotropic_moment(xp.astype(window, wide, copy=False), self.scale)
        rows = dequantize(state.queries, wide)[:, : len(asked), :]
        if not all(asked):
            told = xp.asarray(list(asked), dtype=xp.bool, device=state.keys.device)
            rows = xp.where(told[None, :, None], rows, xp.zeros_like(rows))
        return second_moment(rows, sum(asked))

    def pool(self, held: Means, more: Means, ops: Operations) -> tuple[Means, Array]:
        """Add tokens or whole clusters to those held.

        Parameters
        ----------
        held, more : Means
        ops : Operations

        Returns
        -------
        means : Means
            The clusters that are held keep their places.
        joined : int64 array, shape (streams, places of ``more``)
            The place where each is now.
        """
        if self.delta is not None:
            return join_leaders(held, more, self.delta, ops)
        xp = array_namespace(held.keys)
        joined = positions(more.counts.shape[1], more.keys) + held.counts.shape[1]
        return join(held, more), xp.broadcast_to(joined[None, :], more.counts.shape)

    def most(self, state: MeansState, n_seen: int, places: int) -> int:
        """Return how many clusters of a number of places the budget allows after so many tokens."""
        if self.budget is None:
            return places
        return min(places, self.budget.clusters(n_seen, self.footprint(state.keys, state.values)))

    def rebuild(
        self, state: MeansState, means: Means, keys: list[Array], values: list[Array], ops: Operations
    ) -> MeansState:
        """Put new clusters before the exact tokens.

        Parameters
        ----------
        state : MeansState
            All else is right: the numbers of tokens, queries and samples.
        means : Means
        keys, values : list of arrays, shape (streams, n, dim)
            The exact tokens in pieces, and room for as many as fit; in the dtype of the input.
        ops : Operations

        Returns
        -------
        MeansState
        """
        xp = array_namespace(state.keys)
        dtype = state.keys.dtype
        if self.delta is not None:
            room = min(room_for(int(xp.max(n_live(means)))), means.counts.shape[1])
            means = means.each(lambda x: x[:, :room, ...])

        def dithered(purpose: int) -> Dither:
            return dither(self.seed, purpose, state.n_seen)

        key_codes, value_codes = state.key_codes, state.value_codes
        if self.storage == "int8":
            key_codes = quantize(means.keys, dtype, dithered(_KEYS))
            value_codes = quantize(means.values, dtype, dithered(_VALUES))
        else:
            keys = [round_to(means.keys, dtype, dithered(_KEYS)), *keys]
            values = [round_to(means.values, dtype, dithered(_VALUES)), *values]
        return replace(
            state,
            keys=xp.concat(keys, axis=1),
            values=xp.concat(values, axis=1),
            counts=means.counts,
            spread=round_to(means.spread, dtype, dithered(_SPREAD)),
            importance=round_to(means.importance, dtype, dithered(_IMPORTANCE)),
            key_codes=key_codes,
            value_codes=value_codes,
            leaders=means.leaders,
            tail=Tail(state.n_exact),
        )

    def means(self, state: MeansState, wide: object) -> Means:
        """Return the clusters in the dtype to compute in."""
        xp = array_namespace(state.keys)
        if state.key_codes is None or state.value_codes is None:
            keys = xp.astype(state.keys[:, : state.n_means, :], wide, copy=False)
            values = xp.astype(state.values[:, : state.n_means, :], wide, copy=False)
        else:
            keys, values = dequantize(state.key_codes, wide), dequantize(state.value_codes, wide)
        return Means(
            keys=keys,
            values=values,
            counts=state.counts,
            spread=xp.astype(state.spread, wide, copy=False),
            importance=xp.astype(state.importance, wide, copy=False),
            leaders=state.leaders,
        )


def _answer(state: MeansState, rows: Array, causal: int, ops: Operations) -> tuple[Array, Array]:
    """Outputs and logsumexp over the clusters, the sinks and the window; `causal` as in `sketch_attention`."""
    used = state.n_means + state.n_exact
    keys, values = state.keys[:, :used, :], state.values[:, :used, :]
    weighted = ops.weighted_attention
    if state.key_codes is None or state.value_codes is None:
        return ops.sketch_attention(rows, keys, values, state.counts, state.spread, causal, weighted)
    nothing = state.counts[:, :0]
    exact = ops.sketch_attention(rows, keys, values, nothing, state.spread[:, :0, :], causal, weighted)
    if not state.counts.shape[1]:
        return exact
    keys, values = dequantize(state.key_codes, rows.dtype), dequantize(state.value_codes, rows.dtype)
    return merge_attention(exact, ops.sketch_attention(rows, keys, values, state.counts, state.spread, 0, weighted))


def own_copy(state: MeansState, filled: int) -> MeansState:
    """Copy what is written into, up to ``filled``: another state has written behind this one."""
    xp = array_namespace(state.keys)
    return replace(
        state,
        keys=xp.asarray(state.keys, copy=True),
        values=xp.asarray(state.values, copy=True),
        queries=Codes(xp.asarray(state.queries.codes, copy=True), xp.asarray(state.queries.scales, copy=True)),
        tail=Tail(filled),
    )


def clear_room(state: MeansState) -> MeansState:
    """Return the same state in arrays of its own, with zeros where it holds nothing.

    In their room another state may have written, or be writing; and where a token came without queries, one that was
    there before.
    """
    xp = array_namespace(state.keys)
    asked = [*state.asked, *[False] * (state.queries.scales.shape[1] - len(state.asked))]
    mask = xp.asarray(asked, dtype=xp.bool, device=state.keys.device)
    codes, scales = state.queries.codes, state.queries.scales

    def cleared(x: Array, used: int) -> Array:
        return xp.concat([x[:, :used, ...], xp.zeros_like(x[:, used:, ...])], axis=1)

    used = state.n_means + state.n_exact
    return replace(
        state,
        keys=cleared(state.keys, used),
        values=cleared(state.values, used),
        queries=Codes(
            xp.where(mask[None, :, None], codes, xp.zeros_like(codes)),
            xp.where(mask[None, :], scales, xp.zeros_like(scales)),
        ),
        tail=Tail(state.n_exact),
    )


def _turns(rows: Array, first: int) -> Array:
    """Take one head of the group for each token: ``(streams, group, n, head_dim)`` to ``(streams, n, head_dim)``."""
    xp = array_namespace(rows)
    _, group, n, _ = rows.shape
    if group == 1 or n == 1:  # a single token takes a slice, without a gather
        return rows[:, first % group, :, :]
    turn = (positions(n, rows) + first) % group
    return xp.take_along_axis(rows, turn[None, None, :, None], axis=1)[:, 0, :, :]


def early_weight(n_seen: Any) -> Any:
    """Factor of the importance of a token that is absorbed when so many were seen: a number, or an array."""
    return (_EARLY / n_seen) ** 0.5


def value_scale(values: Array) -> Array:
    """Unit of a distance of values: their mean norm in the window, by weight."""
    xp = array_namespace(values)
    norms = xp.sqrt(xp.sum(values * values, axis=-1))
    scale = xp.mean(norms, axis=-1) / math.sqrt(_VALUE_WEIGHT)
    return xp.where(scale > 0, scale, xp.ones_like(scale))
