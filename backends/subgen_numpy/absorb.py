"""Absorb half a window in compiled loops, streams in threads: the arrays of one stream stay in the cache.

Streams whose numbers are beyond the loops go through the portable steps one by one, and leave the other streams as
they are. Where numba and SciPy are not installed, the portable function runs.
"""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen._tree import leaves, tree_map
from subgen.default.absorb import AbsorbOptions, evict, gather, sample_evicted
from subgen.default.merging import merge_closest
from subgen.default.metric import RULE, query_second_moment
from subgen.default.quantization import Dither
from subgen.default.state import BufferOwner, Clusters, Exact, Quantized, State

from ._float16 import LIMITS, from_roots, saturating_cast, upcast
from ._numba import addresses, compiled
from ._parallel import parallel_for
from .attend import upcast_means
from .merging import WORTH_A_THREAD
from .rounding import quantize_by_loops, round_by_loops

__all__ = ["absorb"]

Floats = NDArray[np.floating[Any]]


def absorb(state: State, options: AbsorbOptions) -> State:
    """Absorb the oldest tokens of the window; see `subgen.default.absorb.absorb`.

    Numbers may be words of bfloat16, see `subgen_numpy._float16`.
    """
    loops, held, exact = compiled("absorb"), state.clusters, state.exact
    stored, queries = exact.keys.dtype, exact.queries
    wide = np.dtype(np.float32) if stored in LIMITS else stored
    known = wide in (np.float32, np.float64) and held.key_variance.dtype == stored
    if loops is None or not known or options.delta is not None:
        return NotImplemented
    (streams, n), capacity = held.counts.shape, exact.capacity
    most = n + options.n_evicted if options.max_clusters is None else min(options.max_clusters, n + options.n_evicted)
    means = [upcast_means(x, wide) for x in (held.keys, held.values)]
    key_variance, importance = (from_roots(x, wide) for x in (held.key_variance, held.importance))
    caches = held.nearest is not None
    nearest = np.full((streams, n), -1, np.int32) if not caches or options.refresh else held.nearest
    exact_keys, exact_values = upcast(exact.keys, wide), upcast(exact.values, wide)
    places, kept = addresses(
        *(*means, held.counts, key_variance, importance, nearest),
        *(exact_keys, exact_values, queries.codes, queries.scales),
    )

    def made(x: NDArray[Any]) -> NDArray[Any]:
        return np.empty((streams, most, *x.shape[2:]), x.dtype)

    new = Clusters(*map(made, (*means, held.counts, key_variance, importance)))
    new_exact = [np.empty(x.shape, x.dtype) for x in (exact_keys, exact_values, queries.codes, queries.scales)]
    assignment, irregular = np.empty((streams, n + options.n_evicted), np.int64), ~held.counts.all(axis=1)
    integers = np.empty(0, np.int32 if wide == np.float32 else np.int64)
    dim = exact.keys.shape[-1]
    factor = 1.0 / dim if options.scale is None else options.scale**2
    new_nearest = np.empty((streams, most if caches else 0), np.int32)
    shared = (
        *(places, integers, capacity - options.sink, options.n_evicted, options.weight, factor),
        *(*astuple(RULE), irregular),
        *(new.keys, new.values, new.counts, new.key_variance, new.importance, new_nearest),
        *(*new_exact, assignment),
    )

    # The arrays must live as long as a thread may come.
    def work(tickets: NDArray[np.int64], waits: bool, _: object = kept) -> None:
        loops.absorb(loops.Arguments(tickets, waits, *shared))

    parallel_for(work, streams * (n + options.n_evicted) // WORTH_A_THREAD, blas=True)
    new = replace(new, nearest=new_nearest if caches else None)
    if irregular.any():
        held = Clusters(means[0], means[1], held.counts, key_variance, importance, nearest=held.nearest)
        exact = replace(exact, keys=exact_keys, values=exact_values)
        for s in np.flatnonzero(irregular):
            _absorb_stream(slice(s, s + 1), held, exact, options, (new, *new_exact, assignment))
    keys, values, codes, scales = new_exact
    left = exact.n - options.n_evicted
    return State(
        clusters=_store(new, stored, options, quantized=state.clusters.keys),
        exact=replace(
            exact,
            keys=saturating_cast(keys, stored),
            values=saturating_cast(values, stored),
            queries=Quantized(codes, scales),
            n=left,
            owner=BufferOwner(left),
        ),
        residual=sample_evicted(state, options, None, assignment),
        n_seen=state.n_seen,
    )


def _absorb_stream(own: slice, held: Clusters, exact: Exact, options: AbsorbOptions, to: tuple[Any, ...]) -> None:
    """Absorb in one stream by the portable steps and write what the loops would.

    Parameters
    ----------
    own : slice
        The stream.
    held, exact : Clusters, Exact
        Of all streams, in the dtype to compute in.
    options : AbsorbOptions
    to : (Clusters, array, array, array, array, array)
        Written: the clusters; keys, values, codes and scales of the exact tokens; the assignment.
    """
    held, exact = tree_map(lambda x: x[own], (held, exact))
    window = tree_map(lambda x: x[:, options.sink :], exact)
    pool, unit = gather(held, window.keys, window.values, options)
    metric = query_second_moment(window.keys, window.queries, options.scale)
    most = to[0].counts.shape[1]
    merged, assignment = merge_closest(pool, metric, unit, most, most)
    left = evict(exact, options.sink, options.n_evicted)
    result = (merged, left.keys, left.values, left.queries.codes, left.queries.scales, assignment)
    for (_, x), (_, new) in zip(leaves(to), leaves(result), strict=True):
        x[own] = new


def _store(clusters: Clusters, stored: np.dtype[Any], options: AbsorbOptions, *, quantized: Any) -> Clusters:
    """Round clusters to what they are stored in; see `subgen.default.absorb.store`."""
    dithers = options.dithers

    def rounded(x: Floats, dither: Dither) -> NDArray[Any]:
        if x.dtype == stored:
            return x
        to = np.empty(x.shape, stored)
        round_by_loops(x, dither, to)
        return to

    def mean(x: Floats, dither: Dither) -> Any:
        return quantize_by_loops(x, stored, dither) if isinstance(quantized, Quantized) else rounded(x, dither)

    variance, importance = clusters.key_variance, clusters.importance
    if stored in LIMITS:
        variance, importance = np.sqrt(variance), np.sqrt(importance)
    return replace(
        clusters,
        keys=mean(clusters.keys, dithers.keys),
        values=mean(clusters.values, dithers.values),
        key_variance=rounded(variance, dithers.key_variance),
        importance=rounded(importance, dithers.importance),
    )
