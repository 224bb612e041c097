"""Exact attention: the yardstick."""

from __future__ import annotations

import math

from ._array import Array, array_namespace, chunks, compute_dtype, concat
from ._checks import check_block, check_groups, check_scale
from ._inputs import outside_modes
from ._memory import pieces, transient_limit
from .backends import Operations, operations_for
from .weighted import causal_bias, merge_attention, scaled

__all__ = ["attention"]


@outside_modes
def attention(
    queries: Array,
    keys: Array,
    values: Array,
    scale: float | None = None,
    causal: bool = False,
) -> Array:
    """Exact attention, the yardstick of everything else: ``softmax(scale * Q K^T) V``.

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
        Factor of the logits; ``None`` means ``head_dim ** -0.5``.
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
    Memory: at most 8 temporary arrays of 2^22 numbers (2^26 on a GPU), and the result once more, whatever the shapes.
    Few queries and, where they are long, parts of the keys are answered at a time; 16-bit keys and values are cast in
    parts (docs/howto/numpy.md).

    Big-endian arrays are computed with in the native byte order, and no gradient is recorded. `torch.autocast` does not
    change the answer.

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
    return _attention(queries, keys, values, scale, causal, kv_heads, operations_for(keys))


def _attention(
    queries: Array,
    keys: Array,
    values: Array,
    scale: float,
    causal: bool,
    kv_heads: int,
    ops: Operations,
) -> Array:
    xp = array_namespace(keys)
    streams, group = math.prod(keys.shape[:-2]), (queries.shape[-3] if len(queries.shape) > 2 else 1) // kv_heads
    (m, n), (head_dim, value_dim) = (queries.shape[-2], keys.shape[-2]), (keys.shape[-1], values.shape[-1])
    q = xp.reshape(queries, (streams, group, m, head_dim))
    k, v = xp.reshape(keys, (streams, n, head_dim)), xp.reshape(values, (streams, n, value_dim))
    # For each key, at least the logits of one query of each head; the key and its value too where they are cast.
    numbers = group if keys.dtype == compute_dtype(keys) else max(group, head_dim, value_dim)
    outputs = [
        _some_streams(q[part, ...], k[part, ...], v[part, ...], scale, causal, numbers, ops)
        for part in pieces(streams, n * numbers, keys)
    ]
    return xp.reshape(concat(outputs, axis=0), (*queries.shape[:-1], value_dim))


def _some_streams(
    queries: Array, keys: Array, values: Array, scale: float, causal: bool, numbers: int, ops: Operations
) -> Array:
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
        # A NumPy matmul of 16-bit floats is unusably slow: cast once, not once for each piece of the queries.
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
            answer = ops.weighted_attention(q, k[:, :used, :], v[:, :used, :], bias)
            if i in partial:
                answer = merge_attention(partial.pop(i), answer)
            if seen > part.stop:
                partial[i] = answer
            else:
                output = xp.astype(answer[0], keys.dtype, copy=False)
                outputs[i] = xp.reshape(output, (streams, group, size, value_dim))
    return concat(outputs, axis=2)
