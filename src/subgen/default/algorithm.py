"""The default sketch, cluster means: its parameters, and the loop that takes tokens in and answers queries.

Data flow::

    tokens -> sinks (the first few, exact)
           -> window (the last ones, exact, each with one of its queries)
                  | full: the oldest half is absorbed
                  v
              clusters of one token  ->  closest pairs merge until the budget is met
                                         (distance from the queries in the window; dissimilar keys last)
              or, with delta, tokens ->  join the cluster of a leader within delta, or open one

A cluster enters attention as one entry, its mean key and mean value, with the log-weight of
`subgen.default.attend.log_weights`. A cluster of one is its token, exactly: rare tokens are kept unchanged, and the
crowd is merged.

Everything that decides is computed when the window is full, from the same arrays whatever the cut of the stream. So the
state does not depend on how calls were cut.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from .._array import Array, array_namespace, chunks, compute_dtype, itemsize, on_cpu, pieces, positions, saturating_cast
from .._checks import MAX_PLACES, check_choice, check_integer, check_real, check_scale, check_seed
from .._random import stream_key
from .._tree import concat, tree_map
from ..softmax import scaled
from .absorb import AbsorbOptions, Tokens, absorb, absorb_blocks, store, upcast_clusters
from .append import append, no_queries, quantize_queries
from .attend import attend, decode
from .budget import Budget, Footprint, budget_arguments, check_budget
from .merging import bands, n_live, no_neighbours
from .metric import query_second_moment, value_scale
from .prompt import Prompt, agglomerate, prompt_weights
from .quantization import draw_dithers
from .residual import correct, empty_residual, sample_tokens
from .state import BufferOwner, Clusters, Exact, Quantized, State

__all__ = ["COMPARE_ALL", "FEW_CLUSTERS", "RESIDUAL_DRAWS", "ClusterMeans", "Storage", "early_weight"]

Storage = Literal["input", "int8"]

# Importance falls with the root of the position, from 1 here: early tokens were merged in a smaller crowd, and later
# answers depend on them as much (docs/experiments.md).
_EARLY = 1000.0
# Up to so many clusters, all are compared with all others in every absorption, which takes little time then. With more,
# clusters cache their nearest neighbour, and all are compared every so many absorptions: often enough that the error
# does not grow by it, and seldom enough to take little of the time (docs/experiments.md).
FEW_CLUSTERS = 768
COMPARE_ALL = 8
# On a device, a block of a prompt has this share of as many tokens as there are clusters: a compromise of time and
# error (docs/experiments.md).
_SHARE = 4
# Queries of a prompt that its metric is computed from, at most: evenly spaced.
_METRIC_QUERIES = 1024
# Purpose of the draws of the residual sample; 1 and 2 are the reservoirs of `subgen.paper`, 3 to 6 dithers.
RESIDUAL_DRAWS = 7


@dataclass(frozen=True)
class ClusterMeans:
    """The parameters of the default sketch, and its pure functions of a state.

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
        Softmax scale; ``None`` means ``head_dim ** -0.5``.
    storage : {"input", "int8"}
        How means are stored: in the dtype of the input, or in int8.
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

    @classmethod
    def from_arguments(
        cls,
        max_clusters: Any = None,
        *,
        delta: Any = None,
        max_bytes: Any = None,
        compression_ratio: Any = None,
        window: Any = 128,
        sink: Any = 4,
        scale: Any = None,
        storage: Any = "input",
        residual_samples: Any = 0,
        seed: Any = 0,
    ) -> ClusterMeans:
        """Check the arguments of `subgen.AttentionSketch` and make the parameters.

        Raises
        ------
        TypeError, ValueError
            If an argument is not a number within its bounds, or two budgets are given.
        """
        delta = None if delta is None else check_real("delta", delta, minimum=0.0)
        check_choice("storage", storage, ("input", "int8"))
        return cls(
            budget=check_budget(max_clusters, max_bytes, compression_ratio, delta),
            delta=delta,
            window=check_integer("window", window, minimum=2, maximum=MAX_PLACES),
            sink=check_integer("sink", sink, minimum=0, maximum=MAX_PLACES),
            scale=None if scale is None else check_scale(scale, 1),
            storage=storage,
            residual_samples=check_integer("residual_samples", residual_samples, minimum=0, maximum=MAX_PLACES),
            seed=check_seed(seed),
        )

    def to_arguments(self) -> dict[str, Any]:
        """Return the arguments that make these parameters, as JSON can hold them."""
        names = ("delta", "window", "sink", "scale", "storage", "residual_samples", "seed")
        return {**{name: getattr(self, name) for name in names}, **budget_arguments(self.budget)}

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
        exact = pair + d + itemsize(compute_dtype(keys), xp)  # a query in int8, and its scale
        return Footprint(
            streams=keys.shape[0],
            pair=pair,
            cluster=mean + 8 + size * (bands(d) + 1) + (0 if self.delta is None else size * d),
            fixed=exact * (self.sink + self.window) + self.residual_samples * (pair + 4 + 8),
            window=self.window,
            few=FEW_CLUSTERS,
            cached=4 if self.delta is None else 0,
        )

    def init(self, keys: Array, values: Array) -> State:
        """Make the empty state for streams like ``(streams, n, head_dim)`` and ``(streams, n, value_dim)``.

        Raises
        ------
        ValueError
            If the budget holds no cluster of this shape and dtype.
        """
        if self.budget is not None:
            self.budget.clusters(0, self.footprint(keys, values))
        xp = array_namespace(keys)
        streams, d, e, capacity = keys.shape[0], keys.shape[-1], values.shape[-1], self.sink + self.window

        def zeros(*shape: int, dtype: object = keys.dtype) -> Array:
            return xp.zeros((streams, *shape), dtype=dtype, device=keys.device)

        def quantized(n: int, dim: int, dtype: object) -> Quantized:
            return Quantized(zeros(n, dim, dtype=xp.int8), zeros(n, dtype=dtype))

        int8 = self.storage == "int8"
        clusters = Clusters(
            keys=quantized(0, d, keys.dtype) if int8 else zeros(0, d),
            values=quantized(0, e, keys.dtype) if int8 else zeros(0, e),
            counts=zeros(0, dtype=xp.int64),
            key_variance=zeros(0, bands(d)),
            importance=zeros(0),
            leaders=None if self.delta is None else zeros(0, d),
        )
        queries = quantized(capacity, d, compute_dtype(keys))
        exact = Exact(zeros(capacity, d), zeros(capacity, e), queries, 0, BufferOwner(0))
        residual = empty_residual(keys, values, self.residual_samples) if self.residual_samples else None
        return State(clusters, exact, residual, 0)

    def n_clusters(self, state: State) -> Array:
        """Count the live clusters: int64, shape (streams,)."""
        return n_live(state.clusters)

    def update(self, state: State, keys: Array, values: Array, queries: Array | None, heads: Array) -> State:
        """Take in a block of tokens.

        Parameters
        ----------
        state : State
        keys, values : array, shape (streams, n, head_dim) and (streams, n, value_dim)
        queries : array, shape (streams, group, n, head_dim), or None
            As they came, of the query heads that share a stream.
        heads : int64 array, shape (streams,)
            Index of each stream along the axis before the tokens; draws depend on it.

        Returns
        -------
        State
        """
        parts = self._parts(state, keys)
        if len(parts) == 1:  # as a rule; slices of a single token take as long as all else here
            return self._update(state, keys, values, queries, heads)
        for part in parts:
            some = None if queries is None else queries[:, :, part, :]
            state = self._update(state, keys[:, part, :], values[:, part, :], some, heads)
        return state

    def _update(self, state: State, keys: Array, values: Array, queries: Array | None, heads: Array) -> State:
        tokens = Tokens(keys, values, None if queries is None else self._quantize(state, queries))
        start, n = 0, keys.shape[1]
        while start < n:
            steps = self._steady_steps(state, n - start)
            if steps:
                part = slice(start, start + steps * self.block)
                times = range(state.n_seen, state.n_seen + steps * self.block, self.block)
                state = absorb_blocks(state, tokens.part(part), self._options(state, times, heads))
            else:
                state, part = self.append_some(state, tokens, start, heads)
            start = part.stop
        return state

    def prefill(self, state: State, keys: Array, values: Array, queries: Array | None, heads: Array) -> State:
        """Take in a whole prompt, in a fraction of the time of `update`; see `subgen.default.prompt`.

        Parameters
        ----------
        state : State
            Empty.
        keys, values, queries, heads
            As in `update`, of the whole prompt.

        Returns
        -------
        State
            With as many exact tokens and clusters as after `update`.
        """
        n, limit = keys.shape[1], self.max_clusters(state, keys.shape[1])
        n_evicted = -(-max(0, n - self.sink - self.window) // self.block) * self.block
        if self.delta is not None or limit is None or n_evicted <= limit:
            return self.update(state, keys, values, queries, heads)
        if not on_cpu(keys):
            if limit // _SHARE <= self.block:
                return self.update(state, keys, values, queries, heads)
            return self._prefill_in_blocks(state, keys, values, queries, heads, n_evicted, limit)
        numbers = max(n * (keys.shape[-1] + values.shape[-1]), limit * limit)
        some = [
            self._compressed(
                keys[part, ...], values[part, ...], None if queries is None else queries[part, ...], n_evicted, limit
            )
            for part in pieces(keys.shape[0], numbers, keys)
        ]
        clusters, labels = concat([x for x, _ in some], axis=0), concat([x for _, x in some], axis=0)
        (options,) = self._options(state, [n], heads)
        quantized = isinstance(state.clusters.keys, Quantized)
        residual = state.residual
        if residual is not None and options.draws is not None:
            xp, own = array_namespace(keys), slice(self.sink, self.sink + n_evicted)
            same = xp.broadcast_to(positions(limit, keys)[None, :], (keys.shape[0], limit))
            residual = sample_tokens(residual, keys[:, own, :], values[:, own, :], labels, same, 0, options.draws)
        state = State(store(clusters, keys.dtype, options.dithers, quantized), state.exact, residual, n_evicted)
        return self.with_cache(self._append_ends(state, keys, values, queries, n_evicted))

    def _prefill_in_blocks(
        self,
        state: State,
        keys: Array,
        values: Array,
        queries: Array | None,
        heads: Array,
        n_evicted: int,
        limit: int,
    ) -> State:
        """Absorb a prompt in blocks of a quarter as many tokens as there are clusters, C.

        All pairs of 5/4 C clusters are compared for each C / 4 tokens: 6.25 C pairs a token, where half windows of b
        tokens take ``(C + b)^2 / b``. In larger blocks too many clusters have to merge at once, and dissimilar ones do.
        """
        n = keys.shape[1]
        codes = no_queries(keys, state.exact.queries) if queries is None else self._quantize(state, queries)
        tokens = Exact(keys, values, codes, n, BufferOwner(None))
        blocks = _large_blocks(n_evicted, limit)
        ends = [min(n, self.sink + stop + self.window) for _, stop in blocks]
        for (start, stop), end, options in zip(blocks, ends, self._options(state, ends, heads), strict=True):
            first = self.sink + start
            window = replace(tree_map(lambda x, part=slice(first, end): x[:, part, ...], tokens), n=end - first)
            options = replace(options, sink=0, n_evicted=stop - start, max_clusters=limit, refresh=True)
            state = self.with_cache(absorb(replace(state, exact=window, n_seen=end - self.sink), options))
        state = replace(state, exact=self.init(keys, values).exact, n_seen=n_evicted)
        return self._append_ends(state, keys, values, queries, n_evicted)

    def _append_ends(self, state: State, keys: Array, values: Array, queries: Array | None, n_evicted: int) -> State:
        """Append the tokens of a prompt that stay exact: the sinks, and the window behind those that left it."""
        for part in (slice(0, self.sink), slice(self.sink + n_evicted, keys.shape[1])):
            if part.start < part.stop:
                rows = None if queries is None else queries[:, :, part, :]
                codes = None if rows is None else self._quantize(replace(state, n_seen=part.start), rows)
                state = append(state, keys[:, part, :], values[:, part, :], codes)
        return state

    def _compressed(
        self, keys: Array, values: Array, queries: Array | None, n_evicted: int, limit: int
    ) -> tuple[Clusters, Array]:
        """Compress the tokens of a prompt that leave the window; see `subgen.default.prompt.agglomerate`."""
        xp, wide, n, first = array_namespace(keys), compute_dtype(keys), keys.shape[1], self.sink
        scale = check_scale(self.scale, keys.shape[-1])
        own = slice(first, first + n_evicted)
        weights = prompt_weights(keys, queries, scale, first, n_evicted) * early_weight(n)
        if queries is None:
            codes = no_queries(keys[:, :1, :], self.init(keys, values).exact.queries)
        else:
            step = -(-n // _METRIC_QUERIES)
            codes = quantize_queries(queries[:, :, first::step, :], scale, 0, wide)
        metric = query_second_moment(keys[:, first:, :], codes, self.scale)
        keys, values = (xp.astype(x, wide, copy=False) for x in (keys, values))
        unit = value_scale(values[:, first:, :])
        return agglomerate(Prompt(keys[:, own, :], values[:, own, :], weights, metric, unit), limit)

    def step(self, state: State, queries: Array, keys: Array, values: Array, heads: Array) -> tuple[State, Array]:
        """Take in a block of tokens and answer each of them, as `update` and `attend` would token by token.

        Parameters
        ----------
        state, keys, values, heads
            As in `update`.
        queries : array, shape (streams, group, n, head_dim)
            Query i is answered after token i.

        Returns
        -------
        state : State
        outputs : array, shape (streams, group, n, value_dim)
            In the dtype of the input, or in that to compute in.
        """
        scale = check_scale(self.scale, queries.shape[-1])
        if keys.shape[1] == 1:
            state, output = decode(self.make_room(state, heads), queries[:, :, 0, :], keys, values, scale)
            return state, output[:, :, None, :]
        outputs: list[Array] = []
        for part in self._parts(state, keys):
            some = queries[:, :, part, :]
            tokens, start = Tokens(keys[:, part, :], values[:, part, :], self._quantize(state, some)), 0
            while start < some.shape[2]:
                state, appended = self.append_some(state, tokens, start, heads)
                outputs += self._answers(state, some[:, :, appended, :], scale)
                start = appended.stop
        return state, concat(outputs, axis=2)

    def _answers(self, state: State, queries: Array, scale: float) -> list[Array]:
        """Answer the queries of the last tokens, a few tokens at a time: ``(streams, group, tokens, value_dim)``."""
        xp, exact = array_namespace(queries), state.exact
        streams, group, n, head_dim = queries.shape
        numbers = streams * group * max(_entries(state), head_dim, exact.values.shape[-1])
        outputs = []
        for part in pieces(n, numbers, queries):
            size = part.stop - part.start
            rows = xp.reshape(scaled(queries[:, :, part, :], scale), (streams, group * size, head_dim))
            seen = replace(state, exact=replace(exact, n=exact.n - (n - part.stop)))
            output = saturating_cast(attend(seen, rows, size)[0], queries)
            outputs.append(xp.reshape(output, (streams, group, size, output.shape[-1])))
        return outputs

    def attend(self, state: State, rows: Array) -> tuple[Array, Array]:
        """Answer scaled queries of shape (streams, m, head_dim); see `subgen.default.attend.attend`."""
        parts = pieces(rows.shape[1], rows.shape[0] * _entries(state), rows)
        if len(parts) == 1:
            return attend(state, rows)
        return concat([attend(state, rows[:, part, :]) for part in parts], axis=1)

    def attend_with_error(self, state: State, rows: Array) -> tuple[Array, Array, Array]:
        """Answer scaled queries by the corrected estimator; see `subgen.default.residual.correct`.

        Returns
        -------
        outputs, error : array, shape (streams, m, value_dim)
        logsumexp : array, shape (streams, m)
        """
        xp, residual = array_namespace(rows), state.residual
        if residual is None:
            raise ValueError("this sketch keeps no residual sample: make it with residual_samples above 0")
        clusters = upcast_clusters(state.clusters, rows.dtype)
        # The value of each sampled token, and of each cluster, besides each answer.
        numbers = max(residual.keys.shape[1], clusters.counts.shape[1]) * state.exact.values.shape[-1]
        absorbed = state.n_seen - state.exact.n
        answers = []
        for part in pieces(rows.shape[1], rows.shape[0] * max(numbers, _entries(state)), rows):
            output, logsumexp = attend(state, rows[:, part, :])
            if absorbed:
                answers.append(correct(rows[:, part, :], output, logsumexp, clusters, residual, absorbed))
            else:
                answers.append((output, xp.zeros_like(output), logsumexp))
        return concat(answers, axis=1)

    def append_some(self, state: State, tokens: Tokens, start: int, heads: Array) -> tuple[State, slice]:
        """Append as many tokens of a block as fit, from ``start`` on, freeing space first; return them as a slice."""
        state = self.make_room(state, heads)
        part = slice(start, start + min(tokens.keys.shape[1] - start, state.exact.capacity - state.exact.n))
        some = tokens if part == slice(0, tokens.keys.shape[1]) else tokens.part(part)
        return append(state, some.keys, some.values, some.queries), part

    def make_room(self, state: State, heads: Array) -> State:
        """Absorb the oldest half of the window if it is full, because the next token needs space.

        This happens when a token comes, not when the window fills: at the same token whatever the cut.
        """
        if state.exact.n < self.sink + self.window:
            return state
        return self.with_cache(absorb(state, self._options(state, [state.n_seen], heads)[0]))

    def with_cache(self, state: State) -> State:
        """Add a cache of nearest neighbours where there are many clusters and none yet."""
        clusters = state.clusters
        if self.delta is not None or clusters.nearest is not None or clusters.counts.shape[1] <= FEW_CLUSTERS:
            return state
        return replace(state, clusters=replace(clusters, nearest=no_neighbours(clusters.counts)))

    def max_clusters(self, state: State, n_seen: int) -> int | None:
        """Return how many clusters the budget allows after so many tokens; ``None``: any number."""
        if self.budget is None:
            return None
        return self.budget.clusters(n_seen, self.footprint(state.exact.keys, state.exact.values))

    def _parts(self, state: State, keys: Array) -> list[slice]:
        """Cut a long block into parts whose queries in int8 take bounded memory.

        The window is full where a part ends: blocks of half a window stay whole.
        """
        streams, n, head_dim = keys.shape
        cut = pieces(n, -(-streams * head_dim // 4), keys)  # four codes take the memory of a number
        if len(cut) == 1:
            return cut
        first = min(n, self.sink + self.window - state.exact.n)
        size = max(1, cut[0].stop // self.block) * self.block
        later = [slice(first + part.start, first + part.stop) for part in chunks(n - first, size)]
        return [slice(0, first), *later] if first else later

    def _quantize(self, state: State, queries: Array) -> Quantized:
        """Select and round a query of each token: ``(streams, group, n, head_dim)`` to ``(streams, n, head_dim)``."""
        scale = check_scale(self.scale, queries.shape[-1])
        return quantize_queries(queries, scale, state.n_seen, state.exact.queries.scales.dtype)

    def _steady_steps(self, state: State, n: int) -> int:
        """Count the steps of n tokens in which shapes do not change; see `absorb_blocks`."""
        places, steps = state.clusters.counts.shape[1], n // self.block
        steady = (
            steps > 1
            and state.exact.n == state.exact.capacity
            and self.delta is None
            and state.residual is None
            and (state.clusters.nearest is not None) == (places > FEW_CLUSTERS)
            and self.max_clusters(state, state.n_seen + n) == places
        )
        return steps if steady else 0

    def _options(self, state: State, times: Any, heads: Array) -> list[AbsorbOptions]:
        """Make the options of absorptions when so many tokens have been seen."""
        draws = None if state.residual is None else stream_key(self.seed, RESIDUAL_DRAWS, heads)
        return [
            AbsorbOptions(
                sink=self.sink,
                n_evicted=self.block,
                weight=early_weight(n_seen),
                max_clusters=self.max_clusters(state, n_seen),
                scale=self.scale,
                dithers=dithers,
                refresh=(n_seen - self.sink - self.window) // self.block % COMPARE_ALL == 0,
                delta=self.delta,
                draws=draws,
            )
            for n_seen, dithers in zip(times, draw_dithers(self.seed, times), strict=True)
        ]


def _large_blocks(n: int, n_clusters: int) -> list[tuple[int, int]]:
    """Cut ``0 .. n`` into blocks of a quarter as many tokens as clusters; the first fills the clusters besides."""
    parts = -(-_SHARE * (n - n_clusters) // n_clusters)
    edges = [0, *(n_clusters + (n - n_clusters) * (i + 1) // parts for i in range(parts))]
    return list(pairwise(edges))


def early_weight(n_seen: Any) -> Any:
    """Compute the factor of the importance of a token that is absorbed after so many: of a number, or an array."""
    return (_EARLY / n_seen) ** 0.5


def _entries(state: State) -> int:
    """Count the clusters and exact tokens of a stream."""
    return int(state.exact.n + state.clusters.counts.shape[1])
