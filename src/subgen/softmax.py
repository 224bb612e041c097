"""Exact attention, weighted attention, and the merging of partial answers by logsumexp.

One softmax over logits plus log-weights answers everything: exact attention (log-weights 0), clusters (``log n``), the
paper's estimator (a ratio of two of them), and partial results of several machines.
"""

from __future__ import annotations

import math

from ._array import Array, array_namespace, chunks, compute_dtype, pieces, positions, transient_limit
from ._checks import check_block, check_groups, check_scale
from ._inputs import outside_modes
from ._tree import concat
from .backends import operation

__all__ = [
    "attention",
    "causal_bias",
    "fold_groups",
    "merge_attention",
    "scaled",
    "softmax_weights",
    "unfold_groups",
    "weighted_attention",
]


@outside_modes
def attention(
    queries: Array,
    keys: Array,
    values: Array,
    scale: float | None = None,
    causal: bool = False,
) -> Array:
    """Compute exact attention: ``softmax(scale * Q K^T) V``.

    Parameters
    ----------
    queries : array, shape (..., q_heads, m, head_dim)
        ``q_heads`` is a multiple of ``kv_heads``: query head ``h`` reads key-value head ``h // (q_heads // kv_heads)``.
    keys : array, shape (..., kv_heads, n, head_dim)
        Of any array API library, in a floating dtype of 16 to 64 bits; the queries and values share both.
    values : array, shape (..., kv_heads, n, value_dim)
        The leading axes are any number of independent streams; ``(n, head_dim)`` and ``(heads, n, head_dim)``
        are fine too.
    scale : float, optional
        Softmax scale; ``None`` means ``head_dim ** -0.5``.
    causal : bool
        The queries belong to the last ``m`` of the ``n`` tokens, and query ``i`` sees tokens ``0 .. n - m + i``.

    Returns
    -------
    array, shape (..., q_heads, m, value_dim)
        In the dtype of the input; the softmax is computed in float32 at least.

    Raises
    ------
    TypeError
        If an argument is not an array of such a dtype, or is one that would be misread (masked, sparse, lazy, traced,
        sharded, ...), or if library, dtype or device differ.
    ValueError
        If shapes do not fit, a block is empty, a number is NaN or infinite, or ``causal`` with ``m > n``.

    Notes
    -----
    Big-endian arrays are computed with in the native byte order, and no gradient is recorded. `torch.autocast` does not
    change the answer.

    Besides its arguments and its result a call takes a constant amount of memory, whatever the shapes: it computes a
    bounded number of logits at a time, and casts 16-bit keys and values in parts (docs/howto/numpy.md).

    Examples
    --------
    >>> import numpy as np, subgen
    >>> q = k = np.zeros((3, 2)); v = np.array([[0.0], [1.0], [5.0]])
    >>> subgen.attention(q, k, v)[:, 0]
    array([2., 2., 2.])
    >>> subgen.attention(q, k, v, causal=True)[:, 0]
    array([0. , 0.5, 2. ])
    """
    keys, values = check_block(keys, values)
    queries = check_groups(queries, keys)
    scale = check_scale(scale, keys.shape[-1])
    m, n = queries.shape[-2], keys.shape[-2]
    if causal and m > n:
        raise ValueError(
            f"causal attention answers the last tokens of the context: got {m} queries for {n} keys; "
            f"pass at most {n} queries, or causal=False"
        )
    kv_heads = keys.shape[-3] if len(keys.shape) > 2 else 1
    return _attention(queries, keys, values, scale, causal, kv_heads)


def _attention(queries: Array, keys: Array, values: Array, scale: float, causal: bool, kv_heads: int) -> Array:
    xp = array_namespace(keys)
    streams, group = math.prod(keys.shape[:-2]), (queries.shape[-3] if len(queries.shape) > 2 else 1) // kv_heads
    (m, n), (head_dim, value_dim) = (queries.shape[-2], keys.shape[-2]), (keys.shape[-1], values.shape[-1])
    q = xp.reshape(queries, (streams, group, m, head_dim))
    k, v = xp.reshape(keys, (streams, n, head_dim)), xp.reshape(values, (streams, n, value_dim))
    # At least the logits of one query of each head; keys and values too where they are cast.
    numbers = n * (group if keys.dtype == compute_dtype(keys) else max(group, head_dim, value_dim))
    outputs = [
        _attend_streams(q[part, ...], k[part, ...], v[part, ...], scale, causal, numbers // n)
        for part in pieces(streams, numbers, keys)
    ]
    return xp.reshape(concat(outputs, axis=0), (*queries.shape[:-1], value_dim))


def _attend_streams(queries: Array, keys: Array, values: Array, scale: float, causal: bool, numbers: int) -> Array:
    """Answer queries of shape (streams, group, m, head_dim), of as many streams as fit or of one.

    Where the keys of one stream are too many, partial answers are merged; ``numbers`` is what a key takes at least.
    """
    xp = array_namespace(keys)
    dtype, value_dim = compute_dtype(keys), values.shape[-1]
    (streams, group, m, head_dim), n = queries.shape, keys.shape[1]
    parts = pieces(n, streams * numbers, keys)
    each = streams * group * max(parts[0].stop, head_dim, value_dim)
    rows = chunks(m, max(1, transient_limit(keys) // each))
    partial: dict[int, tuple[Array, Array]] = {}
    outputs: list[Array] = [None] * len(rows)
    for part in parts:
        # A NumPy matmul of 16-bit floats is unusably slow: upcast once, not once for each piece of the queries.
        k, v = (xp.astype(x[:, part, :], dtype, copy=False) for x in (keys, values))
        for i, some in enumerate(rows):
            size, seen = some.stop - some.start, n - m + some.stop if causal else n
            if seen <= part.start:
                continue
            used = min(part.stop, seen) - part.start
            bias = xp.zeros((1, 1, used), dtype=dtype, device=k.device)
            if causal:
                bias = causal_bias(size, seen, group, k, slice(part.start, part.start + used))
            q = xp.reshape(scaled(queries[:, :, some, :], scale), (streams, group * size, head_dim))
            answer = weighted_attention(q, k[:, :used, :], v[:, :used, :], bias)
            if i in partial:
                answer = merge_attention(partial.pop(i), answer)
            if seen > part.stop:
                partial[i] = answer
            else:
                output = xp.astype(answer[0], keys.dtype, copy=False)
                outputs[i] = xp.reshape(output, (streams, group, size, value_dim))
    return concat(outputs, axis=2)


@operation
def weighted_attention(queries: Array, keys: Array, values: Array, log_weights: Array) -> tuple[Array, Array]:
    """Compute weighted softmax attention, ``sum_j w_j e^<q,k_j> v_j / sum_j w_j e^<q,k_j>``, and the logsumexp.

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
    weights, total, logsumexp = softmax_weights(logits)
    return xp.matmul(weights, xp.astype(values, dtype, copy=False)) / total, logsumexp


def softmax_weights(logits: Array) -> tuple[Array, Array, Array]:
    """Compute the exponentials of logits, relative to the largest of each row, their sum, and the logsumexp.

    Parameters
    ----------
    logits : array, shape (streams, m, n)
        ``-inf`` for an entry of weight zero.

    Returns
    -------
    weights : array, shape (streams, m, n)
    total : array, shape (streams, m, 1)
        Sum of the weights; 1 where every weight is zero.
    logsumexp : array, shape (streams, m)
    """
    xp = array_namespace(logits)
    peak = xp.max(logits, axis=-1, keepdims=True)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    weights = xp.exp(logits - peak)
    total = xp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    safe = xp.where(some, total, xp.ones_like(total))
    logsumexp = xp.where(some, xp.log(safe) + peak, xp.full_like(peak, -math.inf))
    return weights, safe, logsumexp[..., 0]


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


def scaled(queries: Array, scale: float) -> Array:
    """Multiply queries by the softmax scale, in the dtype to compute in."""
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
