"""Answer queries from a state: attention over clusters, each with the mass of its members, and over exact tokens."""

from __future__ import annotations

import math

from .._array import Array, array_namespace, saturating_cast
from ..backends import operation
from ..softmax import causal_bias, scaled, softmax_weights
from .append import append, quantize_queries
from .merging import band_means
from .quantization import dequantize, from_roots
from .state import Quantized, State

__all__ = ["attend", "decode", "half_variance", "log_weights", "upcast"]


@operation
def attend(state: State, rows: Array, causal: int = 0) -> tuple[Array, Array]:
    """Answer scaled queries from the clusters and the exact tokens of a state.

    Parameters
    ----------
    state : State
    rows : array, shape (streams, m, head_dim)
        Scaled queries, in the dtype to compute in.
    causal : int
        If not 0, the rows are the queries of the last ``causal`` tokens, head after head of a group, and query i does
        not see the tokens after i.

    Returns
    -------
    outputs : array, shape (streams, m, value_dim)
    logsumexp : array, shape (streams, m)
        Logarithm of the denominator.
    """
    xp, wide = array_namespace(rows), rows.dtype
    clusters, n = state.clusters, state.exact.n
    keys, values = (xp.astype(x[:, :n, :], wide, copy=False) for x in (state.exact.keys, state.exact.values))
    logits = xp.matmul(rows, xp.matrix_transpose(keys))
    if causal > 1:  # one token sees all
        logits = logits + causal_bias(causal, n, rows.shape[1] // causal, rows)
    n_clusters = clusters.counts.shape[1]
    if n_clusters:
        mean_keys, mean_values = (upcast(x, wide) for x in (clusters.keys, clusters.values))
        mean_logits = xp.matmul(rows, xp.matrix_transpose(mean_keys))
        mean_logits = mean_logits + log_weights(rows, clusters.counts, clusters.key_variance)
        logits = xp.concat([mean_logits, logits], axis=2)
    weights, total, logsumexp = softmax_weights(logits)
    outputs = xp.matmul(weights[:, :, n_clusters:], values)
    if n_clusters:
        outputs = outputs + xp.matmul(weights[:, :, :n_clusters], mean_values)
    return outputs / total, logsumexp


@operation
def decode(state: State, queries: Array, keys: Array, values: Array, scale: float) -> tuple[State, Array]:
    """Append one token and answer its queries from all tokens.

    Parameters
    ----------
    state : State
        With free space for the token; see ``append``.
    queries : array, shape (streams, group, head_dim)
        As they came, of the query heads that share a stream.
    keys, values : array, shape (streams, 1, dim)
    scale : float
        Softmax scale.

    Returns
    -------
    state : State
    outputs : array, shape (streams, group, value_dim)
        In the dtype of the input; numbers beyond it become its largest.
    """
    codes = quantize_queries(queries[:, :, None, :], scale, state.n_seen, state.exact.queries.scales.dtype)
    state = append(state, keys, values, codes)
    outputs, _ = attend(state, scaled(queries, scale), 1)
    return state, saturating_cast(outputs, queries)


def upcast(x: Array | Quantized, wide: object) -> Array:
    """Cast what is stored to the dtype to compute in."""
    return dequantize(x, wide) if isinstance(x, Quantized) else array_namespace(x).astype(x, wide, copy=False)


def log_weights(rows: Array, counts: Array, key_variance: Array) -> Array:
    """Compute the log-weight of each cluster for each query: ``log n + min(variance / 2, log n)``.

    By Jensen's inequality a cluster has more mass than ``n e^<q, mean>``. To second order the missing factor is
    ``e^(Var<q,k> / 2)``. The variance of the members' logits follows from the key variance of each band of
    coordinates: ``sum over bands of key_variance |q_band|^2``. Far from the mean the second order overshoots; a limit
    of a factor n beat fixed limits in trials (docs/experiments.md).

    Parameters
    ----------
    rows : array, shape (streams, m, head_dim)
        Scaled queries.
    counts : array, shape (streams, clusters)
    key_variance : array, shape (streams, clusters, bands)
        See `subgen.default.state.Clusters`.

    Returns
    -------
    array, shape (streams, m, clusters)
        ``-inf`` where a place is free.
    """
    xp = array_namespace(rows)
    counts = xp.astype(counts, rows.dtype, copy=False)
    live = counts > 0
    log_counts = xp.log(xp.where(live, counts, xp.ones_like(counts)))[:, None, :]
    half = half_variance(rows, key_variance)
    weights = log_counts + xp.where(half < log_counts, half, xp.broadcast_to(log_counts, half.shape))
    return xp.where(live[:, None, :], weights, xp.full_like(weights, -math.inf))


def half_variance(rows: Array, key_variance: Array) -> Array:
    """Compute half the variance of the logits of each cluster's members: ``(streams, m, clusters)``."""
    xp = array_namespace(rows)
    key_variance = from_roots(key_variance, rows.dtype)
    energy = band_means(rows * rows) * (0.5 * rows.shape[-1] / key_variance.shape[-1])
    return xp.matmul(energy, xp.matrix_transpose(key_variance))
