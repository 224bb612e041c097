"""What the recent queries teach: which differences of keys matter, and how much attention a token received."""

from __future__ import annotations

import math

from ._array import Array, array_namespace, positions

__all__ = ["attention_received", "isotropic_moment", "second_moment"]

# Added to the second moment of the queries, in units of its mean eigenvalue: a few dozen queries tell little about most
# directions, so the metric leans towards one that treats all alike (docs/experiments.md).
_RIDGE = 0.3


def attention_received(rows: Array, asked: Array, logsumexp: Array, keys: Array) -> Array:
    """Mean attention that the first tokens of a window received from the queries of its tokens.

    Parameters
    ----------
    rows : array, shape (streams, window, head_dim)
        Scaled queries, one a token.
    asked : bool array, shape (window,)
        Whether the token came with a query.
    logsumexp : array, shape (streams, window)
        Over all that each query sees.
    keys : array, shape (streams, block, head_dim)
        Of the first tokens of the window.

    Returns
    -------
    array, shape (streams, block)
        In [0, 1]; averaged over the queries that see the token.
    """
    xp = array_namespace(rows)
    logits = xp.matmul(rows, xp.matrix_transpose(keys))
    token = positions(rows.shape[1], rows)
    asks = (token[:, None] >= token[None, : keys.shape[1]]) & asked[:, None]
    # Masked before the exponential: what a query must not see may overflow it.
    logits = xp.where(asks[None, :, :], logits - logsumexp[:, :, None], xp.full_like(logits, -math.inf))
    received = xp.sum(xp.exp(logits), axis=1)
    times = xp.sum(xp.astype(asks, rows.dtype), axis=0)
    return received / xp.where(times > 0, times, xp.ones_like(times))[None, :]


def second_moment(rows: Array, asked: Array) -> Array:
    """Second moment of the queries in the window, with a ridge: ``(streams, head_dim, head_dim)``.

    Parameters
    ----------
    rows : array, shape (streams, window, head_dim)
        Scaled queries; zeros where a token came without.
    asked : bool array, shape (window,)
    """
    xp = array_namespace(rows)
    moment = xp.matmul(xp.matrix_transpose(rows), rows) / xp.sum(xp.astype(asked, rows.dtype))
    identity = _identity(rows)
    mean_eigenvalue = xp.sum(moment * identity, axis=(1, 2), keepdims=True) / moment.shape[-1]
    mean_eigenvalue = xp.where(mean_eigenvalue > 0, mean_eigenvalue, xp.ones_like(mean_eigenvalue))
    return moment + _RIDGE * mean_eigenvalue * identity


def isotropic_moment(keys: Array, scale: float | None) -> Array:
    """Second moment of queries that nobody has shown: as long as the keys, in every direction alike."""
    xp = array_namespace(keys)
    factor = 1.0 / keys.shape[-1] if scale is None else scale * scale
    moment = xp.mean(keys * keys, axis=(1, 2), keepdims=True)
    moment = xp.where(moment > 0, moment, xp.ones_like(moment))
    return factor * moment * _identity(keys)


def _identity(like: Array) -> Array:
    xp = array_namespace(like)
    return xp.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None, :, :]
