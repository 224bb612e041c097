"""Arrays and states of the default sketch to call operations with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen._tree import leaves
from subgen.default.absorb import AbsorbOptions
from subgen.default.merging import bands
from subgen.default.quantization import draw_dithers, quantize
from subgen.default.state import BufferOwner, Clusters, Exact, Quantized, Residual, State

SEED = 20240612

# Attention in float32 loses a few units of the last place per term; 1e-5 relative to values of order 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def weighted(rng: np.random.Generator) -> list[NDArray[np.float32]]:
    """Make queries, keys, values and log-weights; in the second stream nothing has weight."""
    shapes = [(2, 5, 4), (2, 7, 4), (2, 7, 3), (2, 1, 7)]
    q, k, v, w = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    w[0, 0, 3] = -np.inf
    w[1] = -np.inf
    return [q, k, v, w]


def wide_dtype(dtype: Any) -> Any:
    """Return the dtype to compute in."""
    return np.float64 if dtype is np.float64 else np.float32


def full_state(
    n_clusters: int,
    *,
    streams: int = 2,
    dims: tuple[int, int] = (16, 24),
    capacity: tuple[int, int] = (3, 12),
    dtype: Any = np.float32,
    nearest: float | None = None,
    asked: float = 1.0,
    quantized: bool = False,
) -> State:
    """Make a state with a full window, ready to be absorbed.

    Parameters
    ----------
    n_clusters, streams : int
    dims : (int, int)
        Of keys and of values.
    capacity : (int, int)
        Sinks and window.
    dtype : floating dtype
    nearest : float or None
        Share of the clusters with a cached neighbour, which need not be the nearest; ``None``: no cache.
    asked : float
        Share of the tokens with a query.
    quantized : bool
        Whether means are in int8.
    """
    rng = np.random.default_rng(SEED)
    (dim, value_dim), n = dims, sum(capacity)

    def normal(*shape: int) -> NDArray[Any]:
        return rng.normal(size=shape).astype(dtype)

    def stored(means: NDArray[Any]) -> Any:
        return quantize(means.astype(wide_dtype(dtype)), dtype) if quantized else means

    counts = rng.integers(1, 9, (streams, n_clusters))
    cached = None
    if nearest is not None:
        cached = (np.arange(n_clusters) + rng.integers(1, n_clusters, (streams, n_clusters))) % n_clusters
        cached = np.where(rng.random((streams, n_clusters)) < nearest, cached, -1).astype(np.int32)
    clusters = Clusters(
        keys=stored(normal(streams, n_clusters, dim) + dtype(1)),
        values=stored(normal(streams, n_clusters, value_dim)),
        counts=counts,
        key_variance=(counts > 1)[:, :, None] * rng.random((streams, n_clusters, bands(dim))).astype(dtype),
        importance=rng.random((streams, n_clusters)).astype(dtype) + dtype(0.1),
        nearest=cached,
    )
    keys, values = normal(streams, n, dim) + dtype(1), normal(streams, n, value_dim)
    queries = quantize(normal(streams, n, dim).astype(wide_dtype(dtype)), wide_dtype(dtype))
    has_query = rng.random(n) < asked
    queries = Quantized(
        queries.codes * has_query[:, None].astype(np.int8),
        queries.scales * has_query.astype(queries.scales.dtype),
    )
    return State(clusters, Exact(keys, values, queries, n, BufferOwner(n)), None, n + int(counts.sum(axis=1).max()))


def state_of(
    keys: Any,
    values: Any,
    clusters: Clusters,
    *,
    queries: Quantized | None = None,
    n: int | None = None,
    n_seen: int | None = None,
) -> State:
    """Make a state of given arrays, of which the first n tokens count; without queries, zeros stand for them."""
    if queries is None:
        wide = np.float64 if keys.dtype == np.float64 else np.float32
        queries = Quantized(np.zeros(keys.shape, np.int8), np.zeros(keys.shape[:2], wide))
    n = keys.shape[1] if n is None else n
    return State(clusters, Exact(keys, values, queries, n, BufferOwner(n)), None, n if n_seen is None else n_seen)


def random_clusters(
    rng: np.random.Generator, shape: tuple[int, int], dims: tuple[int, int], dtype: Any, *, quantized: bool = False
) -> Clusters:
    """Make clusters to attend to: some places are free. ``shape`` is (streams, clusters)."""

    def means(dim: int) -> Any:
        if not quantized:
            return rng.normal(size=(*shape, dim)).astype(dtype)
        codes = rng.integers(-127, 128, (*shape, dim)).astype(np.int8)
        return Quantized(codes, rng.uniform(2**-9, 2**-6, shape).astype(dtype))

    return Clusters(
        *map(means, dims),
        counts=rng.integers(0, 5, shape),
        key_variance=rng.random((*shape, bands(dims[0]))).astype(dtype),
        importance=np.ones(shape, dtype),
    )


def absorb_options(n_evicted: int, max_clusters: int | None, *, sink: int = 3) -> AbsorbOptions:
    """Make the options of an absorption from a state of `full_state`."""
    return AbsorbOptions(sink, n_evicted, 0.7, max_clusters, None, draw_dithers(1, [9])[0])


def tracked(state: State, options: AbsorbOptions) -> tuple[State, AbsorbOptions]:
    """Add a residual sample that follows the place of every cluster and evicted token, and samples no token itself."""
    streams, places = state.clusters.counts.shape[0], state.clusters.counts.shape[1] + options.n_evicted
    followed = np.broadcast_to(np.arange(places, dtype=np.int32), (streams, places))
    keys, values = (np.zeros((streams, places, x.shape[-1]), x.dtype) for x in (state.exact.keys, state.exact.values))
    residual = Residual(keys, values, followed, np.full((streams, places), 2**62))
    zeros = np.zeros(streams, np.int64)
    return replace(state, residual=residual), replace(options, draws=(zeros, zeros))


def arrays_of(state: State) -> dict[str, Any]:
    """Return all arrays by name, and the number of exact tokens."""
    return {**dict(leaves(state)), "exact.n": np.asarray(state.exact.n)}
