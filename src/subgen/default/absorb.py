"""Absorb tokens that leave the window: gather them behind the clusters, merge the closest, store the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .._array import Array, array_namespace, compute_dtype, positions
from .._tree import concat, tree_map
from ..backends import operation
from ..leaders import padded_capacity
from .append import append
from .attend import upcast
from .merging import merge_closest, n_live, no_neighbours, singletons
from .metric import key_dissimilarity, mean_direction, query_second_moment, value_scale
from .quantization import Dithers, from_roots, quantize, round_roots, round_to
from .residual import sample_tokens
from .state import BufferOwner, Clusters, Exact, Quantized, Residual, State
from .threshold import join_leaders

__all__ = [
    "AbsorbOptions",
    "Tokens",
    "absorb",
    "absorb_blocks",
    "evict",
    "gather",
    "places_behind",
    "sample_evicted",
    "store",
    "upcast_clusters",
]


@dataclass(frozen=True)
class AbsorbOptions:
    """What `absorb` needs besides the state.

    Attributes
    ----------
    sink : int
        Tokens at the front that never leave.
    n_evicted : int
        Tokens that leave the window, from behind the sinks.
    weight : float
        Factor of the importance of these tokens.
    max_clusters : int or None
        Clusters that may be left; ``None``: any number.
    scale : float or None
        Softmax scale; ``None`` means ``head_dim ** -0.5``.
    dithers : Dithers
    refresh : bool
        Whether all clusters are compared with all others, whatever is cached.
    delta : float or None
        Threshold mode, see `subgen.default.threshold`.
    draws : (int64 array, int64 array) or None
        Key of the residual sample, each of shape (streams,); see ``subgen._random.stream_key``.
    """

    sink: int
    n_evicted: int
    weight: float
    max_clusters: int | None
    scale: float | None
    dithers: Dithers
    refresh: bool = False
    delta: float | None = None
    draws: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class Tokens:
    """A block of tokens: keys and values, ``(streams, n, dim)``, and a query of each token or ``None``."""

    keys: Array
    values: Array
    queries: Quantized | None

    def part(self, places: slice) -> Tokens:
        """Return some of the tokens."""
        return tree_map(lambda x: x[:, places, ...], self)


@operation
def absorb(state: State, options: AbsorbOptions) -> State:
    """Move the oldest tokens of a full window into the clusters, and merge the closest clusters down to the budget.

    Parameters
    ----------
    state : State
        With a full window.
    options : AbsorbOptions

    Returns
    -------
    State
        With ``n_evicted`` free places behind the exact tokens, in new arrays.
    """
    n_held = state.clusters.counts.shape[1]
    keys, values = (x[:, options.sink :, :] for x in (state.exact.keys, state.exact.values))
    pool, unit = gather(state.clusters, keys, values, options)
    joined = None
    if options.delta is not None:
        pool, joined = join_leaders(pool.part(slice(n_held)), pool.part(slice(n_held, None)), options.delta)
    queries = tree_map(lambda x: x[:, options.sink :, ...], state.exact.queries)
    metric = query_second_moment(keys, queries, options.scale)
    places = pool.counts.shape[1]
    left = places if options.max_clusters is None else min(places, options.max_clusters)
    merged, assignment = merge_closest(pool, metric, unit, left, left)
    quantized = isinstance(state.clusters.keys, Quantized)
    return State(
        clusters=store(merged, keys.dtype, options.dithers, quantized, padded=options.delta is not None),
        exact=evict(state.exact, options.sink, options.n_evicted),
        residual=sample_evicted(state, options, joined, assignment),
        n_seen=state.n_seen,
    )


@operation
def absorb_blocks(state: State, tokens: Tokens, steps: Sequence[AbsorbOptions]) -> State:
    """Absorb half a window and append as many tokens, step after step.

    With as many clusters as there will ever be, every step has the same shapes: a backend can record one and replay it.

    Parameters
    ----------
    state : State
        With a full window, without leaders or a residual sample; after every step as many clusters are left.
    tokens : Tokens
        ``n_evicted`` of them for each step.
    steps : sequence of AbsorbOptions
        At least one; they differ in ``weight``, ``dithers`` and ``refresh`` alone.

    Returns
    -------
    State
    """
    for i, options in enumerate(steps):
        block = tokens.part(slice(i * options.n_evicted, (i + 1) * options.n_evicted))
        state = append(absorb(state, options), block.keys, block.values, block.queries)
    return state


def gather(clusters: Clusters, keys: Array, values: Array, options: AbsorbOptions) -> tuple[Clusters, Array]:
    """Put the tokens that leave the window behind the clusters, as clusters of one.

    Parameters
    ----------
    clusters : Clusters
        In the dtype of storage.
    keys, values : array, shape (streams, window, dim)
        The window, as it is stored.
    options : AbsorbOptions

    Returns
    -------
    pool : Clusters
        In the dtype to compute in, except leaders and cached neighbours.
    unit : array, shape (streams,)
        See `subgen.default.metric.value_scale`.
    """
    xp, wide, n = array_namespace(keys), compute_dtype(keys), options.n_evicted
    leaders = None if clusters.leaders is None else keys[:, :n, :]
    keys, values = (xp.astype(x, wide, copy=False) for x in (keys, values))
    held, tokens = upcast_clusters(clusters, wide), keys[:, :n, :]
    if options.refresh and held.nearest is not None:
        held = replace(held, nearest=no_neighbours(held.counts))
    anchor, mean = mean_direction(keys, held.keys, xp.astype(held.counts, wide))
    importance = key_dissimilarity(tokens, anchor, mean) * options.weight
    new = singletons(tokens, values[:, :n, :], importance, leaders, cache_nearest=held.nearest is not None)
    return concat([held, new], axis=1), value_scale(values)


def upcast_clusters(clusters: Clusters, wide: object) -> Clusters:
    """Cast what is stored to the dtype to compute in, except counts, leaders and cached neighbours."""
    return replace(
        clusters,
        keys=upcast(clusters.keys, wide),
        values=upcast(clusters.values, wide),
        key_variance=from_roots(clusters.key_variance, wide),
        importance=from_roots(clusters.importance, wide),
    )


def store(clusters: Clusters, dtype: object, dithers: Dithers, quantized: bool, *, padded: bool = False) -> Clusters:
    """Round clusters to what they are stored in.

    Parameters
    ----------
    clusters : Clusters
        In float32 or float64.
    dtype : floating dtype
        Of the input.
    dithers : Dithers
    quantized : bool
        Whether means are stored in int8.
    padded : bool
        Whether the number of places follows the largest number of clusters in a stream.

    Returns
    -------
    Clusters
    """
    if padded:
        xp = array_namespace(clusters.counts)
        capacity = padded_capacity(int(xp.max(n_live(clusters))))
        clusters = clusters.part(slice(min(capacity, clusters.counts.shape[1])))
    rounded = quantize if quantized else round_to
    return replace(
        clusters,
        keys=rounded(clusters.keys, dtype, dithers.keys),
        values=rounded(clusters.values, dtype, dithers.values),
        key_variance=round_roots(clusters.key_variance, dtype, dithers.key_variance),
        importance=round_roots(clusters.importance, dtype, dithers.importance),
    )


def evict(exact: Exact, sink: int, n: int) -> Exact:
    """Remove the first n tokens behind the sinks and close the gap, in new arrays that end in zeros."""
    xp = array_namespace(exact.keys)

    def closed_up(x: Array) -> Array:
        return xp.concat([x[:, :sink, ...], x[:, sink + n :, ...], xp.zeros_like(x[:, :n, ...])], axis=1)

    return replace(tree_map(closed_up, exact), n=exact.n - n, owner=BufferOwner(exact.n - n))


def sample_evicted(state: State, options: AbsorbOptions, joined: Array | None, assignment: Array) -> Residual | None:
    """Offer the tokens that leave the window to the residual sample, if there is one.

    Parameters
    ----------
    state : State
        Before the absorption.
    options : AbsorbOptions
    joined : int64 array, shape (streams, n_evicted), or None
        Place of each token's cluster before the merges; ``None``: behind the clusters.
    assignment : int64 array, shape (streams, places)
        The new place of each cluster; see `subgen.default.merging.merge_closest`.
    """
    if state.residual is None or options.draws is None:
        return state.residual
    first, end = options.sink, options.sink + options.n_evicted
    keys, values = (x[:, first:end, :] for x in (state.exact.keys, state.exact.values))
    if joined is None:
        joined = places_behind(state.clusters.counts, options.n_evicted)
    offered = state.n_seen - state.exact.n
    return sample_tokens(state.residual, keys, values, joined, assignment, offered, options.draws)


def places_behind(counts: Array, n: int) -> Array:
    """Return the n places behind those of some clusters, for each stream: int64, shape (streams, n)."""
    xp = array_namespace(counts)
    streams, held = counts.shape
    return xp.broadcast_to((positions(n, counts) + held)[None, :], (streams, n))
