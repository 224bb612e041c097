"""Exact attention: the yardstick."""

from __future__ import annotations

import math

from ._array import Array, array_namespace, chunks, compute_dtype
from ._checks import check_block, check_groups, check_scale
from .backends import Operations, operations_for
from .weighted import causal_bias, fold_groups

__all__ = ["attention"]

# Logits held at once (numbers, not bytes): bounds the memory of one call whatever its size.
_LOGITS_AT_ONCE = 1 << 23


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
        Any array API library and any floating dtype; the queries and values share both.
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
        If an argument is not an array, or library, dtype or device differ.
    ValueError
        If shapes do not fit, a block is empty, a number is NaN or infinite, or ``causal`` with ``m > n``.

    Examples
    --------
    >>> import numpy as np, subgen
    >>> q = k = np.zeros((3, 2)); v = np.array([[0.0], [1.0], [5.0]])
    >>> subgen.attention(q, k, v)[:, 0]
    array([2., 2., 2.])
    >>> subgen.attention(q, k, v, causal=True)[:, 0]
    array([0. , 0.5, 2. ])
    """
    check_block(keys, values)
    check_groups(queries, keys)
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
    dtype = compute_dtype(keys)
    streams = math.prod(keys.shape[:-2])
    m, n = queries.shape[-2], keys.shape[-2]
    k = xp.reshape(keys, (streams, n, keys.shape[-1]))
    v = xp.reshape(values, (streams, n, values.shape[-1]))
    rows = fold_groups(xp.astype(queries, dtype, copy=False) * scale, kv_heads)
    group = rows.shape[1] // m
    rows = xp.reshape(rows, (streams, group, m, rows.shape[-1]))
    pieces = []
    # A NumPy matmul of 16-bit floats is unusably slow: widen once, not once per piece.
    k, v = xp.astype(k, dtype, copy=False), xp.astype(v, dtype, copy=False)
    for part in chunks(m, max(1, _LOGITS_AT_ONCE // max(1, n * streams * group))):
        size = part.stop - part.start
        piece = xp.reshape(rows[:, :, part, :], (streams, group * size, rows.shape[-1]))
        seen = n - m + part.stop if causal else n
        out, _ = ops.weighted_attention(
            piece,
            k[:, :seen, :],
            v[:, :seen, :],
            causal_bias(size, seen, group, k) if causal else xp.zeros((1, 1, seen), dtype=dtype, device=k.device),
        )
        pieces.append(xp.reshape(out, (streams, group, size, v.shape[-1])))
    out = pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=2)
    return xp.reshape(xp.astype(out, keys.dtype, copy=False), (*queries.shape[:-1], values.shape[-1]))
