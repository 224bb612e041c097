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

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

from ._array import Array, array_namespace, chunks, compute_dtype, concat, itemsize, narrow, positions
from ._checks import check_scale
from ._memory import pieces
from .absorbing import Absorption, Dithers, Exact, Settled, means_and_exact, widened
from .backends import Operations
from .blocks import Tokens, Turn
from .budget import Budget, Footprint
from .clustering import room_for
from .counter import stream_key
from .decoding import answer, written
from .leaders import join_leaders
from .merging import Means, bands, n_live, nobody
from .residual import Residual, correct, empty_residual, sample_tokens
from .rounding import Codes, dither, dithers
from .tail import Tail
from .weighted import join_rows, scaled

__all__ = [
    "COMPARE_ALL",
    "FEW_CLUSTERS",
    "RESIDUAL_DRAWS",
    "ClusterMeans",
    "MeansState",
    "Storage",
    "claimed",
    "clear_room",
    "early_weight",
    "own_copy",
]

Storage = Literal["input", "int8"]

# Importance falls with the root of the position, from 1 here: what came early was merged in a smaller crowd, and later
# answers depend on it as much (docs/experiments.md).
_EARLY = 1000.0
# Up to so many clusters all are compared with all others in every absorption, which takes little time then. With more,
# they remember their nearest others, and all are compared anew every so many absorptions: often enough that the error
# does not grow by it, and seldom enough to take little of the time (docs/experiments.md).
FEW_CLUSTERS = 768
COMPARE_ALL = 8
# What is drawn, told apart: dithers of keys, values, spread and importance, and the residual sample; 1 and 2 are the
# reservoirs of `subgen.paper`.
_OF_CLUSTERS, RESIDUAL_DRAWS = (3, 4, 5, 6), 7


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
    counts : int64 array, shape (streams, clusters)
    spread, importance : array, shape (streams, clusters, bands) and (streams, clusters)
        See `subgen.merging.Means`; in the dtype of the input.
    key_codes, value_codes : Codes or None
        The means, with ``storage="int8"``.
    leaders : array, shape (streams, clusters, head_dim), or None
        See `subgen.leaders`; with ``delta``.
    nearest : int32 array, shape (streams, clusters), or None
        See `subgen.merging.Means`; with more than ``FEW_CLUSTERS`` places and without ``delta``.
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
    nearest: Array | None
    queries: Codes
    asked: tuple[bool, ...]
    residual: Residual | None
    tail: Tail

    @property
    def n_means(self) -> int:
        """Places of clusters in ``keys`` and ``values``."""
        return 0 if self.key_codes is not None else int(self.counts.shape[1])

    @property
    def exact(self) -> Exact:
        """The exact tokens and the room behind them."""
        return means_and_exact(self, self.n_means, self.asked)[2]


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
            cluster=mean + 8 + size * (bands(d) + 1) + (0 if self.delta is None else size * d),
            fixed=pair * (self.sink + self.window) + (d + wide) * self.window + self.residual_samples * (pair + 4 + 8),
            window=self.window,
            few=FEW_CLUSTERS,
            remembered=4 if self.delta is None else 0,
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
            counts=zeros(0, dtype=xp.int64),
            spread=zeros(0, bands(d)),
            importance=zeros(0),
            key_codes=Codes(zeros(0, d, dtype=xp.int8), zeros(0)) if coded else None,
            value_codes=Codes(zeros(0, e, dtype=xp.int8), zeros(0)) if coded else None,
            leaders=None if self.delta is None else zeros(0, d),
            nearest=None,
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
        self, state: MeansState, keys: Array, values: Array, queries: Array | None, heads: Array, ops: Operations
    ) -> MeansState:
        """Absorb tokens; see `subgen.method.Method.update`."""
        parts = self._parts(state, keys)
        if len(parts) == 1:  # as a rule, and slices of a single token take as long as the rest here
            return self._update(state, keys, values, queries, heads, ops)
        for part in parts:
            some = None if queries is None else queries[:, :, part, :]
            state = self._update(state, keys[:, part, :], values[:, part, :], some, heads, ops)
        return state

    def _update(
        self, state: MeansState, keys: Array, values: Array, queries: Array | None, heads: Array, ops: Operations
    ) -> MeansState:
        codes = None if queries is None else self._codes(state, queries, ops)
        start, n = 0, keys.shape[1]
        while start < n:
            turns = self._turns(state, n - start, codes is not None)
            if turns:
                part = slice(start, start + turns * self.block)
                state = self._absorb_blocks(state, turns, _part(keys, values, codes, part), ops)
            else:
                state, part = self._take(state, keys, values, codes, start, heads, ops)
            start = part.stop
        return state

    def step(
        self, state: MeansState, queries: Array, keys: Array, values: Array, heads: Array, ops: Operations
    ) -> tuple[MeansState, Array]:
        """Absorb tokens and answer each of them; see `subgen.method.Method.step`."""
        n, head_dim = queries.shape[2:]
        scale = check_scale(self.scale, head_dim)
        if n == 1:
            state, output = self._decode(state, queries[:, :, 0, :], keys, values, scale, heads, ops)
            return state, output[:, :, None, :]
        outputs: list[Array] = []
        for part in self._parts(state, keys):
            some = queries[:, :, part, :], keys[:, part, :], values[:, part, :]
            state, answers = self._step(state, *some, scale, heads, ops)
            outputs += answers
        return state, concat(outputs, axis=2)

    def _step(
        self, state: MeansState, queries: Array, keys: Array, values: Array, scale: float, heads: Array, ops: Operations
    ) -> tuple[MeansState, list[Array]]:
        codes = self._codes(state, queries, ops)
        outputs, start = [], 0
        while start < keys.shape[1]:
            state, part = self._take(state, keys, values, codes, start, heads, ops)
            outputs += self._answers(state, queries[:, :, part, :], scale, ops)
            start = part.stop
        return state, outputs

    def _answers(self, state: MeansState, queries: Array, scale: float, ops: Operations) -> list[Array]:
        """Answer the queries of the last tokens, a few tokens at a time: arrays (streams, group, tokens, value_dim)."""
        xp = array_namespace(queries)
        streams, group, n, head_dim = queries.shape
        pairs = state.counts.shape[1] + state.n_exact
        outputs = []
        for part in pieces(n, streams * group * max(pairs, head_dim, state.values.shape[-1]), queries):
            size = part.stop - part.start
            rows = xp.reshape(scaled(queries[:, :, part, :], scale), (streams, group * size, head_dim))
            output, _ = _answer(state, rows, size, ops, later=n - part.stop)
            outputs.append(xp.reshape(narrow(output, queries), (streams, group, size, output.shape[-1])))
        return outputs

    def _decode(
        self, state: MeansState, queries: Array, keys: Array, values: Array, scale: float, heads: Array, ops: Operations
    ) -> tuple[MeansState, Array]:
        """Absorb one token and answer it: ``(streams, group, head_dim)`` to ``(streams, group, value_dim)``."""
        state = claimed(self.make_room(state, heads, ops), 1)
        decoded = ops.decode(state, queries, keys, values, scale, ops)
        return self._appended(state, 1, decoded.keys, decoded.values, decoded.queries, True), decoded.outputs

    def attend(self, state: MeansState, rows: Array, ops: Operations) -> tuple[Array, Array]:
        """Answer queries from the state; see `subgen.method.Method.attend`."""
        parts = pieces(rows.shape[1], rows.shape[0] * (state.n_exact + state.counts.shape[1]), rows)
        if len(parts) == 1:
            return _answer(state, rows, 0, ops)
        return join_rows([_answer(state, rows[:, part, :], 0, ops) for part in parts])

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
        # The value of each slot, and of each cluster, against each answer.
        others = max(residual.keys.shape[1], state.counts.shape[1]) * state.values.shape[-1]
        absorbed = state.n_seen - state.n_exact
        answers = []
        for part in pieces(rows.shape[1], rows.shape[0] * max(others, state.n_exact + state.counts.shape[1]), rows):
            output, logsumexp = _answer(state, rows[:, part, :], 0, ops)
            if absorbed:
                answers.append(correct(rows[:, part, :], output, logsumexp, means, residual, absorbed))
            else:
                answers.append((output, xp.zeros_like(output), logsumexp))
        return tuple(xp.concat([answer[i] for answer in answers], axis=1) for i in range(3))

    def _take(
        self,
        state: MeansState,
        keys: Array,
        values: Array,
        codes: Codes | None,
        start: int,
        heads: Array,
        ops: Operations,
    ) -> tuple[MeansState, slice]:
        """Take as many tokens as fit, making room first; return them as a slice."""
        state = self.make_room(state, heads, ops)
        filled = state.n_exact
        size = min(keys.shape[1] - start, self.sink + self.window - filled)
        part = slice(start, start + size)
        if codes is not None:
            skip = min(size, max(0, self.sink - filled))  # sinks, which keep no query
            mine = slice(start + skip, part.stop)
            codes = codes.part(mine)
        return self.append(state, keys[:, part, :], values[:, part, :], codes, ops), part

    def _parts(self, state: MeansState, keys: Array) -> list[slice]:
        """Cut a long block into parts, of which the queries in 8 bits take bounded memory.

        The window is full where a part ends: blocks of half a window stay whole.
        """
        streams, n, head_dim = keys.shape
        cut = pieces(n, -(-streams * head_dim // 4), keys)  # four codes take the memory of a number
        if len(cut) == 1:
            return cut
        first = min(n, self.sink + self.window - state.n_exact)
        size = max(1, cut[0].stop // self.block) * self.block
        later = [slice(first + part.start, first + part.stop) for part in chunks(n - first, size)]
        return [slice(0, first), *later] if first else later

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
        size = keys.shape[1]
        state = claimed(state, size)
        return self._appended(state, size, *written(state, keys, values, codes, ops), codes is not None)

    def _appended(
        self, state: MeansState, size: int, keys: Array, values: Array, queries: Codes, asked: bool
    ) -> MeansState:
        """Count tokens whose keys, values and queries are written."""
        n_exact = state.n_exact + size
        behind = min(size, max(0, n_exact - self.sink))  # those that are no sinks
        return replace(
            state,
            keys=keys,
            values=values,
            n_exact=n_exact,
            n_seen=state.n_seen + size,
            queries=queries,
            asked=state.asked + (asked,) * behind,
        )

    def _absorb(self, state: MeansState, heads: Array, ops: Operations) -> MeansState:
        """Move the oldest half of a full window into the clusters."""
        held = self.stored(state)
        if held.nearest is not None and self._anew(state.n_seen):
            held = replace(held, nearest=nobody(held.counts))
        exact = state.exact
        rest = replace(state, n_exact=state.n_exact - self.block, asked=state.asked[self.block :])
        if self.delta is None:
            told = Absorption(
                leave=self.block,
                weight=early_weight(state.n_seen),
                most=self.most(state, state.n_seen, held.counts.shape[1] + self.block),
                scale=self.scale,
                dithers=self._dithers(state.n_seen),
                coded=self.storage == "int8",
            )
            absorbed = ops.absorb(held, exact, told, ops)
            moved = absorbed.moved
            after = self._settled(rest, absorbed.settled, absorbed.counts, None, absorbed.nearest)
        else:
            pool, value_scale = ops.collect(held, *exact.window, self.block, early_weight(state.n_seen))
            pool, joined = self.pool(pool, held.counts.shape[1], ops)
            most = self.most(state, state.n_seen, pool.counts.shape[1])
            merged, moved = ops.merge_closest(pool, self.metric(state, ops), value_scale, most, most)
            after = self.rebuild(rest, merged, exact, self.block, ops)
        residual = state.residual
        if residual is not None:
            if self.delta is None:
                joined = _in_places_behind(held.counts, self.block)
            key = stream_key(self.seed, RESIDUAL_DRAWS, heads, ops.threefry2x32)
            offered = state.n_seen - self.sink - self.window
            keys, values = (x[:, : self.block, :] for x in exact.window)
            residual = sample_tokens(residual, keys, values, joined, moved, offered, key, ops)
        return replace(after, residual=residual)

    def _codes(self, state: MeansState, queries: Array, ops: Operations) -> Codes:
        """Choose and round a query of each token: ``(streams, group, n, head_dim)`` to ``(streams, n, head_dim)``."""
        scale = check_scale(self.scale, queries.shape[-1])
        return ops.query_codes(queries, scale, state.n_seen, state.queries.scales.dtype, ops)

    def _turns(self, state: MeansState, n: int, asked: bool) -> int:
        """Count the turns of n tokens in which nothing changes but numbers; see `subgen.blocks`."""
        places, turns = state.counts.shape[1], n // self.block
        steady = (
            turns > 1
            and state.n_exact == self.sink + self.window
            and self.delta is None
            and state.residual is None
            and set(state.asked) == {asked}
            and (state.nearest is not None) == (places > FEW_CLUSTERS)
            and self.most(state, state.n_seen + n, places + self.block) == places
        )
        return turns if steady else 0

    def _absorb_blocks(self, state: MeansState, turns: int, tokens: Tokens, ops: Operations) -> MeansState:
        """Take so many blocks of half a window."""
        held = self.stored(state)
        times = range(state.n_seen, state.n_seen + turns * self.block, self.block)
        drawn = (dithers(self.seed, what, times) for what in _OF_CLUSTERS)
        differing = [
            Turn(early_weight(n), Dithers(*each), held.nearest is not None and self._anew(n))
            for n, *each in zip(times, *drawn, strict=True)
        ]
        turned = ops.absorb_blocks(held, state.exact, tokens, self.scale, self.block, differing, ops)
        after = replace(state, n_seen=times[-1] + self.block)
        return self._settled(after, turned.settled, turned.counts, None, turned.nearest)

    def _anew(self, n_seen: int) -> bool:
        """Whether clusters that remember their nearest others are all compared, when room is made."""
        return (n_seen - self.sink - self.window) // self.block % COMPARE_ALL == 0

    def metric(self, state: MeansState, ops: Operations) -> Array:
        """Which differences of keys matter, by the queries in the window: ``(streams, head_dim, head_dim)``."""
        window = slice(state.n_means + self.sink, state.n_means + state.n_exact)
        return ops.query_moment(state.keys[:, window, :], state.queries, state.asked, self.scale)

    def pool(self, means: Means, held: int, ops: Operations) -> tuple[Means, Array]:
        """Let tokens or whole clusters join those held, with ``delta``; without, they are clusters of their own.

        Parameters
        ----------
        means : Means
            The clusters that are held, and what joins them behind.
        held : int
            Places of the clusters that are held.
        ops : Operations

        Returns
        -------
        means : Means
            The clusters that are held keep their places.
        joined : int64 array, shape (streams, places behind ``held``)
            The place where each is now.
        """
        if self.delta is not None:
            return join_leaders(means.part(slice(held)), means.part(slice(held, None)), self.delta, ops)
        return means, _in_places_behind(means.counts[:, :held], means.counts.shape[1] - held)

    def most(self, state: MeansState, n_seen: int, places: int) -> int:
        """Return how many clusters of a number of places the budget allows after so many tokens."""
        if self.budget is None:
            return places
        return min(places, self.budget.clusters(n_seen, self.footprint(state.keys, state.values)))

    def rebuild(self, state: MeansState, means: Means, exact: Exact, leave: int, ops: Operations) -> MeansState:
        """Put new clusters before the exact tokens.

        Parameters
        ----------
        state : MeansState
            Right are the numbers of tokens, and the samples.
        means : Means
        exact : Exact
            As of now, in the dtype of the input.
        leave : int
            How many of the exact tokens leave from behind the sinks.
        ops : Operations

        Returns
        -------
        MeansState
        """
        if self.delta is not None:
            xp = array_namespace(state.keys)
            room = min(room_for(int(xp.max(n_live(means)))), means.counts.shape[1])
            means = means.part(slice(room))
        dithers, coded = self._dithers(state.n_seen), self.storage == "int8"
        settled = ops.settle(means, exact, leave, dithers, coded)
        return self._settled(state, settled, means.counts, means.leaders, means.nearest)

    def _dithers(self, n_seen: int) -> Dithers:
        return Dithers(*(dither(self.seed, what, n_seen) for what in _OF_CLUSTERS))

    def _settled(
        self, state: MeansState, settled: Settled, counts: Array, leaders: Array | None, nearest: Array | None
    ) -> MeansState:
        if self.delta is None and nearest is None and counts.shape[1] > FEW_CLUSTERS:
            nearest = nobody(counts)
        return replace(
            state,
            keys=settled.keys,
            values=settled.values,
            counts=counts,
            spread=settled.spread,
            importance=settled.importance,
            key_codes=settled.key_codes,
            value_codes=settled.value_codes,
            leaders=leaders,
            nearest=nearest,
            queries=settled.queries,
            tail=Tail(state.n_exact),
        )

    def stored(self, state: MeansState) -> Means:
        """Return the clusters as they are stored."""
        keys, values, _ = means_and_exact(state, state.n_means, state.asked)
        return Means(keys, values, state.counts, state.spread, state.importance, state.leaders, state.nearest)

    def means(self, state: MeansState, wide: object) -> Means:
        """Return the clusters in the dtype to compute in."""
        return widened(self.stored(state), wide)


def _answer(state: MeansState, rows: Array, causal: int, ops: Operations, later: int = 0) -> tuple[Array, Array]:
    """Outputs and logsumexp over the clusters, the sinks and the window.

    ``causal`` is that of `subgen.mass.sketch_attention`; none of the queries sees the last ``later`` tokens.
    """
    used = state.n_means + state.n_exact - later
    return answer(state, rows, state.keys[:, :used, :], state.values[:, :used, :], causal, ops)


def _in_places_behind(counts: Array, n: int) -> Array:
    """Return the places behind those of some clusters, for each stream: int64, shape (streams, n)."""
    xp = array_namespace(counts)
    streams, held = counts.shape
    return xp.broadcast_to((positions(n, counts) + held)[None, :], (streams, n))


def claimed(state: MeansState, size: int) -> MeansState:
    """Return the state, or a copy in arrays of its own, so that it may write so many tokens behind the exact ones."""
    filled = state.n_exact
    return state if state.tail.claim(filled, filled + size) else own_copy(state, filled + size)


def own_copy(state: MeansState, filled: int) -> MeansState:
    """Copy what is written into, up to ``filled``: another state has written behind this one."""
    xp = array_namespace(state.keys)

    def copied(x: Array) -> Array:
        return xp.asarray(x, copy=True)

    return replace(
        state,
        keys=copied(state.keys),
        values=copied(state.values),
        queries=state.queries.each(copied),
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


def _part(keys: Array, values: Array, codes: Codes | None, part: slice) -> Tokens:
    return Tokens(keys[:, part, :], values[:, part, :], None if codes is None else codes.part(part))


def early_weight(n_seen: Any) -> Any:
    """Factor of the importance of a token that is absorbed when so many were seen: a number, or an array."""
    return (_EARLY / n_seen) ** 0.5
