"""Inputs of the tests of kernels, and references to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from cuda_targets import DTYPES

from subgen._tree import leaves, tree_map
from subgen.default.absorb import AbsorbOptions
from subgen.default.merging import bands
from subgen.default.quantization import draw_dithers
from subgen.default.state import BufferOwner, Clusters, Exact, Quantized, State

__all__ = [
    "TOLERANCE",
    "absorb_options",
    "cached_neighbours",
    "exact_clusters",
    "make_clusters",
    "make_state",
    "random_quantized",
    "random_vectors",
    "upcast",
    "weighted_attention",
    "written",
]

# Sums of a few hundred float32 terms of order 1, in another order than the reference's.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def weighted_attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute weighted attention in float64, written out; log-weights of shape (streams, m, n)."""
    logits = queries.astype(np.float64) @ keys.astype(np.float64).swapaxes(1, 2)
    logits = np.where(np.isneginf(weights), -np.inf, logits + weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        peak = np.where(np.isneginf(logits).all(axis=-1), 0.0, logits.max(axis=-1))[..., None]
        p = np.exp(logits - peak)
        total = p.sum(axis=-1, keepdims=True)
        return np.where(total > 0, p @ values.astype(np.float64) / total, 0.0), (np.log(total) + peak)[..., 0]


def random_vectors(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    """Draw normal numbers of a dtype."""
    return rng.normal(size=shape).astype(DTYPES[dtype])


def random_quantized(rng: np.random.Generator, n: int, dim: int, dtype: str) -> Quantized:
    """Draw two streams of vectors in int8, all codes among them."""
    codes = rng.integers(-127, 128, size=(2, n, dim)).astype(np.int8)
    codes.reshape(-1)[:255] = np.arange(-127, 128)[: codes.size]
    return Quantized(codes, (0.01 + rng.random((2, n)) / 64).astype(DTYPES[dtype]))


def make_clusters(keys: Any, values: Any, counts: np.ndarray, variance: np.ndarray, **more: Any) -> Clusters:
    """Make clusters; without an importance, all have the same."""
    return Clusters(keys, values, counts, variance, **{"importance": np.ones(counts.shape, np.float32), **more})


def make_state(clusters: Clusters, keys: Any, values: Any, queries: Quantized, n: int, n_seen: int) -> State:
    """Make a state with n exact tokens, which may write behind them."""
    return State(clusters, Exact(keys, values, queries, n, BufferOwner(n)), None, n_seen)


def absorb_options(
    n_evicted: int,
    sink: int = 0,
    *,
    weight: float = 1.0,
    max_clusters: int | None = None,
    scale: float | None = None,
    refresh: bool = False,
) -> AbsorbOptions:
    """Make the options of an absorption."""
    return AbsorbOptions(sink, n_evicted, weight, max_clusters, scale, draw_dithers(3, [77])[0], refresh)


def exact_clusters(
    rng: np.random.Generator, streams: int, n: int, head_dim: int, value_dim: int, free: Sequence[float] = (0.1,)
) -> Clusters:
    """Draw clusters whose costs are exact in float32: small integers about a mean of zero, weights powers of two.

    A share of the places of each stream is free.
    """
    half = n // 2
    keys = rng.integers(-3, 4, size=(streams, half, head_dim))
    keys = np.concatenate([keys, -keys, np.zeros((streams, n - 2 * half, head_dim))], axis=1)
    counts = 2 ** rng.integers(0, 3, size=(streams, half))
    counts = np.concatenate([counts, counts, np.ones((streams, n - 2 * half), np.int64)], axis=1)
    dead = rng.random((streams, half)) < np.array(free)[:, None]
    counts = np.where(np.concatenate([dead, dead, np.zeros((streams, n - 2 * half), bool)], axis=1), 0, counts)
    values = rng.integers(-3, 4, size=(streams, n, value_dim))
    variance = rng.integers(0, 4, size=(streams, n, bands(head_dim)))
    importance = 2.0 ** rng.integers(-1, 2, size=(streams, n))
    order = rng.permutation(n)
    arrays = keys, values, counts, variance, importance
    clusters = Clusters(*(np.ascontiguousarray(x[:, order]).astype(np.float32) for x in arrays))
    return replace(clusters, counts=clusters.counts.astype(np.int64))


def cached_neighbours(rng: np.random.Generator, counts: np.ndarray, new: float) -> np.ndarray:
    """Draw a cached neighbour that lives for each cluster, but for a share of them, which are new."""
    nearest = np.full(counts.shape, -1, np.int32)
    for row, live in zip(nearest, counts > 0, strict=True):
        places = np.flatnonzero(live)
        for i in places if len(places) > 1 else ():
            row[i] = -1 if rng.random() < new else rng.choice(places[places != i])
    return nearest


def upcast(tree: Any) -> Any:
    """Cast bfloat16 and float16 to float32, which is exact: NumPy does not compute with bfloat16."""
    return tree_map(lambda x: x if x.dtype.kind in "iub" else x.astype(np.float32), tree)


def written(state: State) -> dict[str, Any]:
    """Return the arrays of a state by name, without the free space behind the exact tokens."""
    n = state.exact.n
    return dict(leaves(replace(state, exact=tree_map(lambda x: x[:, :n], state.exact))))
