"""The mass of a cluster for a query, and attention over clusters and exact pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ._array import Array, array_namespace
from .merging import band_means
from .rounding import Codes, dequantize, from_roots
from .weighted import causal_bias, merge_attention, weighted_attention

__all__ = ["coded_attention", "half_variance", "log_weights", "sketch_attention"]


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
        See `subgen.merging.Means`.

    Returns
    -------
    array, shape (streams, m, clusters)
        ``-inf`` where a place is free.
    """
    xp = array_namespace(rows)
    counts = xp.astype(counts, rows.dtype, copy=False)
    live = counts > 0
    log_counts = xp.log(xp.where(live, counts, xp.ones_like(counts)))[:, None, :]
    half = half_variance(rows, spread)
    weights = log_counts + xp.where(half < log_counts, half, xp.broadcast_to(log_counts, half.shape))
    return xp.where(live[:, None, :], weights, xp.full_like(weights, -math.inf))


def half_variance(rows: Array, spread: Array) -> Array:
    """Half the variance of the logits of the members of each cluster, for each query: ``(streams, m, clusters)``."""
    xp = array_namespace(rows)
    spread = from_roots(spread, rows.dtype)
    energy = band_means(rows * rows) * (0.5 * rows.shape[-1] / spread.shape[-1])
    return xp.matmul(energy, xp.matrix_transpose(spread))


def sketch_attention(
    rows: Array,
    keys: Array,
    values: Array,
    counts: Array,
    spread: Array,
    causal: int = 0,
    weighted: Callable[..., tuple[Array, Array]] = weighted_attention,
) -> tuple[Array, Array]:
    """Attention over clusters, and over exact pairs behind them.

    Parameters
    ----------
    rows : array, shape (streams, m, head_dim)
        Scaled queries, in the dtype to compute in.
    keys, values : array, shape (streams, clusters + exact, ...)
        Any floating dtype; the clusters come first.
    counts : int64 array, shape (streams, clusters)
        Members of each cluster; 0 marks a place that is free.
    spread : array, shape (streams, clusters, bands)
        See `subgen.merging.Means`.
    causal : int
        If not 0, the last tokens there are, and the rows are their queries, head after head of a group: query i
        does not see the tokens after i.
    weighted : callable
        The operation that attends; see `subgen.weighted.weighted_attention`.

    Returns
    -------
    outputs : array, shape (streams, m, value_dim)
    logsumexp : array, shape (streams, m)
    """
    xp = array_namespace(rows)
    streams, m, _ = rows.shape
    clusters, exact = counts.shape[1], keys.shape[1] - counts.shape[1]
    if causal:
        bias = causal_bias(causal, exact, m // causal, rows)
    else:
        bias = xp.zeros((1, 1, exact), dtype=rows.dtype, device=rows.device)
    if clusters:
        bias = xp.broadcast_to(bias, (streams, m, exact))
        bias = xp.concat([log_weights(rows, counts, spread), bias], axis=2)
    return weighted(rows, keys, values, bias)


def coded_attention(
    rows: Array,
    keys: Array,
    values: Array,
    counts: Array,
    spread: Array,
    key_codes: Codes,
    value_codes: Codes,
    causal: int,
    ops: Any,
) -> tuple[Array, Array]:
    """Attention over clusters whose means are in 8 bits, and over exact pairs.

    Parameters
    ----------
    rows : array, shape (streams, m, head_dim)
        Scaled queries, in the dtype to compute in.
    keys, values : array, shape (streams, exact, dim)
        The exact pairs, in any floating dtype.
    counts, spread
        Of the clusters; see `sketch_attention`.
    key_codes, value_codes : Codes, of shape (streams, clusters, dim)
        Their means.
    causal : int
        See `sketch_attention`.
    ops : Operations
        ``sketch_attention`` of the exact pairs, and of the means when they are widened, put together, is what this is.

    Returns
    -------
    outputs : array, shape (streams, m, value_dim)
    logsumexp : array, shape (streams, m)
    """
    attend, weighted = ops.sketch_attention, ops.weighted_attention
    exact: tuple[Array, Array] = attend(rows, keys, values, counts[:, :0], spread[:, :0, :], causal, weighted)
    if not counts.shape[1]:
        return exact
    keys, values = dequantize(key_codes, rows.dtype), dequantize(value_codes, rows.dtype)
    return merge_attention(exact, attend(rows, keys, values, counts, spread, 0, weighted))
