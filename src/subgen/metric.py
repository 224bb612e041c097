"""What decides which clusters merge: which differences of keys matter to recent queries, and which keys are unusual."""

from __future__ import annotations

from ._array import Array, array_namespace, clip, compute_dtype
from .rounding import Codes, dequantize

__all__ = ["LEAST_ANGLE", "RIDGE", "query_moment", "typical_direction", "unusualness"]

# Added to the second moment of the queries, in units of its mean eigenvalue: a few dozen queries tell little about most
# directions, so the metric leans towards one that treats all alike (docs/experiments.md).
RIDGE = 1.0
# Mean of 1 - cos below which it is rounding.
LEAST_ANGLE = 1e-5


def typical_direction(keys: Array, held: Array, counts: Array) -> tuple[Array, Array]:
    """Return the stream's mean direction, and how far its tokens point away from it on average.

    Parameters
    ----------
    keys : array, shape (streams, n, head_dim)
        Tokens.
    held : array, shape (streams, clusters, head_dim)
        Mean keys of the others.
    counts : array, shape (streams, clusters)
        Their members; dtype of the keys.

    Returns
    -------
    anchor : array, shape (streams, 1, head_dim)
    mean : array, shape (streams, 1)
        Of ``1 - cos``.
    """
    xp = array_namespace(keys)
    length, old_length = _lengths(keys), _lengths(held)
    # Products with all keys, which are read and not written.
    anchor = xp.matmul((1.0 / length)[:, None, :], keys) + xp.matmul((counts / old_length)[:, None, :], held)
    anchor = anchor / _lengths(anchor)[:, :, None]
    old_away = _away(held, old_length, anchor) * counts
    total = xp.sum(_away(keys, length, anchor), axis=1, keepdims=True) + xp.sum(old_away, axis=1, keepdims=True)
    return anchor, total / (keys.shape[1] + xp.sum(counts, axis=1, keepdims=True))


def unusualness(keys: Array, anchor: Array, mean: Array) -> Array:
    """How far keys point away from the stream's mean direction, in units of its average; to a power, an importance.

    Keys that point elsewhere than most are those that a later query may single out: KeyDiff (arXiv 2504.15364) keeps
    them and drops the rest. Here they merge last. Attention received so far, which most methods go by, says little of
    what is asked for later (docs/experiments.md).

    Parameters
    ----------
    keys : array, shape (streams, n, head_dim)
    anchor, mean : array, shape (streams, 1, head_dim) and (streams, 1)
        From `typical_direction`.

    Returns
    -------
    array, shape (streams, n)
        The fourth power of ``1 - cos`` over its mean over all tokens, that ratio within [0.3, 5]; 1 where directions
        differ by no more than the rounding of float32.
    """
    xp = array_namespace(keys)
    away = _away(keys, _lengths(keys), anchor)
    told = mean > LEAST_ANGLE
    ratio = xp.where(told, away / xp.where(told, mean, xp.ones_like(mean)), xp.ones_like(away))
    return clip(ratio, 0.3, 5.0) ** 4


def _lengths(x: Array) -> Array:
    """Norms, and 1 for a zero: ``(streams, n, dim)`` to ``(streams, n)``."""
    xp = array_namespace(x)
    norms = xp.sqrt(xp.vecdot(x, x))
    return xp.where(norms > 0, norms, xp.ones_like(norms))


def _away(keys: Array, length: Array, anchor: Array) -> Array:
    """``1 - cos`` of the angle between keys and a direction: shape (streams, n); 1 where it is beyond the dtype."""
    xp = array_namespace(keys)
    cosine = xp.matmul(keys, xp.matrix_transpose(anchor))[:, :, 0] / length
    return 1.0 - xp.where(xp.isfinite(cosine), cosine, xp.zeros_like(cosine))


def query_moment(keys: Array, queries: Codes, asked: tuple[bool, ...], scale: float | None) -> Array:
    """Second moment of the queries in the window, with a ridge.

    Without any, that of queries as long as the keys, in every direction alike.

    Parameters
    ----------
    keys : array, shape (streams, n, head_dim)
        The tokens in the window, as they are stored; only their lengths tell, and only where no query was shown.
    queries : Codes, of shape (streams, window, head_dim)
        Scaled queries, the first of the tokens in the window.
    asked : tuple of bool, length n
        Which tokens came with queries.
    scale : float or None
        Factor of the logits; ``None`` means ``head_dim ** -0.5``.

    Returns
    -------
    array, shape (streams, head_dim, head_dim)
        In the dtype to compute in.
    """
    wide = compute_dtype(keys)
    xp = array_namespace(keys)
    if not any(asked):
        return _isotropic_moment(xp.astype(keys, wide, copy=False), scale)
    rows = dequantize(queries, wide)[:, : len(asked), :]
    if not all(asked):
        told = xp.asarray(list(asked), dtype=xp.bool, device=keys.device)
        rows = xp.where(told[None, :, None], rows, xp.zeros_like(rows))
    moment = xp.matmul(xp.matrix_transpose(rows), rows) / sum(asked)
    identity = _identity(rows)
    mean_eigenvalue = xp.sum(moment * identity, axis=(1, 2), keepdims=True) / moment.shape[-1]
    mean_eigenvalue = xp.where(mean_eigenvalue > 0, mean_eigenvalue, xp.ones_like(mean_eigenvalue))
    return moment + RIDGE * mean_eigenvalue * identity


def _isotropic_moment(keys: Array, scale: float | None) -> Array:
    xp = array_namespace(keys)
    factor = 1.0 / keys.shape[-1] if scale is None else scale * scale
    moment = xp.mean(keys * keys, axis=(1, 2), keepdims=True)
    moment = xp.where(moment > 0, moment, xp.ones_like(moment))
    return factor * moment * _identity(keys)


def _identity(like: Array) -> Array:
    xp = array_namespace(like)
    return xp.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None, :, :]
