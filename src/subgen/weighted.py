"""Weighted attention, and the merging of partial answers by logsumexp.

One operation answers everything: exact attention (log-weights 0), clusters (log-weights ``log n``), the paper's
estimator (a ratio of two of them), and partial results of several machines.
"""

from __future__ import annotations

import math

from ._array import Array, array_namespace, compute_dtype, concat, positions

__all__ = [
    "causal_bias",
    "fold_groups",
    "join_rows",
    "merge_attention",
    "scaled",
    "unfold_groups",
    "weighted_attention",
]


def weighted_attention(queries: Array, keys: Array, values: Array, log_weights: Array) -> tuple[Array, Array]:
    """Weighted softmax attention: ``sum_j w_j e^<q,k_j> v_j / sum_j w_j e^<q,k_j>`` and its log-denominator.

    Parameters
    ----------
    queries : array, shape (streams, m, head_dim)
        Already scaled, in the dtype to compute in (float32 or float64).
    keys : array, shape (streams, n, head_dim)
        Any floating dtype.
    values : array, shape (streams, n, value_dim)
        Any floating dtype.
    log_weights : array, shape (streams, 1, n) or (streams, m, n)
        Logarithms of the weights, ``-inf`` for a pair that takes no part; dtype of the queries.

    Returns
    -------
    outputs : array, shape (streams, m, value_dim)
        Zero where every weight is zero. Dtype of the queries.
    logsumexp : array, shape (streams, m)
        ``log sum_j w_j e^<q,k_j>``; ``-inf`` where every weight is zero.
    """
    xp = array_namespace(queries)
    dtype = queries.dtype
    logits = xp.matmul(queries, xp.matrix_transpose(xp.astype(keys, dtype, copy=False))) + log_weights
    peak = xp.max(logits, axis=-1, keepdims=True)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    weights = xp.exp(logits - peak)
    total = xp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    outputs = xp.matmul(weights, xp.astype(values, dtype, copy=False))
    outputs = outputs / xp.where(some, total, xp.ones_like(total))
    logsumexp = xp.where(some, xp.log(xp.where(some, total, xp.ones_like(total))) + peak, xp.full_like(peak, -math.inf))
    return outputs, logsumexp[..., 0]


def merge_attention(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Merge two partial answers over disjoint sets of pairs into the answer over their union.

    Parameters
    ----------
    first, second : (array, array)
        Outputs of shape (streams, m, value_dim) and logsumexp of shape (streams, m), as
        `weighted_attention` gives them.

    Returns
    -------
    (array, array)
        Outputs and logsumexp of the union, same shapes.
    """
    (a, lse_a), (b, lse_b) = first, second
    xp = array_namespace(a)
    peak = xp.maximum(lse_a, lse_b)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    weight_a, weight_b = xp.exp(lse_a - peak), xp.exp(lse_b - peak)
    total = weight_a + weight_b
    some = total > 0
    safe = xp.where(some, total, xp.ones_like(total))
    outputs = (a * weight_a[..., None] + b * weight_b[..., None]) / safe[..., None]
    return outputs, xp.where(some, xp.log(safe) + peak, xp.full_like(peak, -math.inf))


def join_rows(pieces: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Join the outputs and logsumexps of consecutive rows of queries."""
    return concat([output for output, _ in pieces], axis=1), concat([lse for _, lse in pieces], axis=1)


def scaled(queries: Array, scale: float) -> Array:
    """Multiply queries by the factor of the logits, in the dtype to compute in."""
    wide = compute_dtype(queries)
    return (queries if queries.dtype == wide else array_namespace(queries).astype(queries, wide)) * scale


def fold_groups(queries: Array, num_key_value_heads: int) -> Array:
    """Fold the query heads that share a key-value head into rows: ``(..., q_heads, m, d)`` to ``(streams, g * m, d)``.

    Query head ``h`` reads key-value head ``h // g``, as in every grouped-query model. Without a head axis
    ``g`` is 1.
    """
    xp = array_namespace(queries)
    *leading, m, head_dim = queries.shape
    group = leading[-1] // num_key_value_heads if leading else 1
    streams = math.prod(leading) // group
    return xp.reshape(queries, (streams, group * m, head_dim))


def unfold_groups(rows: Array, queries_shape: tuple[int, ...]) -> Array:
    """Undo `fold_groups`: ``(streams, g * m, value_dim)`` to ``(..., q_heads, m, value_dim)``."""
    xp = array_namespace(rows)
    return xp.reshape(rows, (*queries_shape[:-1], rows.shape[-1]))


def causal_bias(size: int, seen: int, group: int, like: Array, part: slice | None = None) -> Array:
    """Return log-weights that hide later tokens, where the rows are queries of the last tokens.

    Parameters
    ----------
    size : int
        Queries of each head.
    seen : int
        Tokens, of which the queries belong to the last ``size``.
    group : int
        Query heads, one after the other.
    like : array
        Gives library, dtype and device.
    part : slice, optional
        The tokens to return log-weights of; ``None`` means all.

    Returns
    -------
    array, shape (1, group * size, tokens)
        0 where a query sees a token, ``-inf`` elsewhere.
    """
    xp = array_namespace(like)
    part = slice(0, seen) if part is None else part
    last = positions(size, like) + (seen - size - part.start)
    hidden = positions(part.stop - part.start, like)[None, :] > last[:, None]
    # Of no axes: an array of the whole shape would be one more.
    zero = xp.zeros((), dtype=like.dtype, device=like.device)
    bias = xp.where(hidden, xp.full_like(zero, -math.inf), zero)
    return xp.tile(bias, (group, 1))[None, :, :]
