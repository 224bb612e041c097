"""Which clusters merge: differences of keys as recent queries weigh them, and a weight for dissimilar keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .._array import Array, array_namespace, clip, compute_dtype
from .quantization import dequantize
from .state import Quantized

__all__ = ["RULE", "Rule", "key_dissimilarity", "mean_direction", "query_second_moment", "value_scale"]


@dataclass(frozen=True)
class Rule:
    """The constants of the merging rule; kernels and compiled loops get them as arguments (docs/experiments.md).

    Attributes
    ----------
    ridge : float
        Added to the second moment of the queries, in units of its mean eigenvalue. A few dozen queries say little about
        most directions, so the metric leans towards one that treats all directions alike.
    value_weight : float
        Weight of a squared distance of values, in units of their typical norm, against one of logits. The key variance
        corrects for keys that were merged wrongly; nothing corrects for values.
    least_angle : float
        Mean of ``1 - cos`` below which it is rounding.
    least_ratio, most_ratio : float
        Bounds of the dissimilarity of a key over the mean.
    """

    ridge: float = 1.0
    value_weight: float = 3.0
    least_angle: float = 1e-5
    least_ratio: float = 0.3
    most_ratio: float = 5.0


RULE = Rule()


def mean_direction(keys: Array, mean_keys: Array, counts: Array) -> tuple[Array, Array]:
    """Compute the mean direction of the keys of a stream, and the mean of ``1 - cos`` to it.

    Parameters
    ----------
    keys : array, shape (streams, n, head_dim)
        Of the tokens in the window.
    mean_keys : array, shape (streams, clusters, head_dim)
        Of the clusters.
    counts : array, shape (streams, clusters)
        Members of the clusters; dtype of the keys.

    Returns
    -------
    anchor : array, shape (streams, 1, head_dim)
    mean : array, shape (streams, 1)
    """
    xp = array_namespace(keys)
    length, mean_length = _lengths(keys), _lengths(mean_keys)
    # Matrix products read all keys without a temporary of their size.
    anchor = xp.matmul((1.0 / length)[:, None, :], keys) + xp.matmul((counts / mean_length)[:, None, :], mean_keys)
    anchor = anchor / _lengths(anchor)[:, :, None]
    of_clusters = _one_minus_cosine(mean_keys, mean_length, anchor) * counts
    of_tokens = _one_minus_cosine(keys, length, anchor)
    total = xp.sum(of_tokens, axis=1, keepdims=True) + xp.sum(of_clusters, axis=1, keepdims=True)
    return anchor, total / (keys.shape[1] + xp.sum(counts, axis=1, keepdims=True))


def key_dissimilarity(keys: Array, anchor: Array, mean: Array) -> Array:
    """Compute the dissimilarity of keys from the mean direction, to the fourth power: the importance of tokens.

    Keys that point elsewhere than most are those that a later query may single out: KeyDiff (arXiv 2504.15364) keeps
    them and drops the rest; here they merge last. Attention received so far, which most methods use, says little about
    later queries (docs/experiments.md).

    Parameters
    ----------
    keys : array, shape (streams, n, head_dim)
    anchor, mean : array, shape (streams, 1, head_dim) and (streams, 1)
        From `mean_direction`.

    Returns
    -------
    array, shape (streams, n)
        The fourth power of ``1 - cos`` over its mean, that ratio within the bounds of `Rule`; 1 where all directions
        agree within the rounding of float32.
    """
    xp = array_namespace(keys)
    away = _one_minus_cosine(keys, _lengths(keys), anchor)
    differs = mean > RULE.least_angle
    ratio = xp.where(differs, away / xp.where(differs, mean, xp.ones_like(mean)), xp.ones_like(away))
    return clip(ratio, RULE.least_ratio, RULE.most_ratio) ** 4


def value_scale(values: Array) -> Array:
    """Compute the unit of a distance of values: their mean norm over the window, divided by the root of their weight.

    Parameters
    ----------
    values : array, shape (streams, window, value_dim)
        In float32 or float64.

    Returns
    -------
    array, shape (streams,)
        1 where all values are zero.
    """
    xp = array_namespace(values)
    norms = xp.sqrt(xp.sum(values * values, axis=-1))
    scale = xp.mean(norms, axis=-1) / math.sqrt(RULE.value_weight)
    return xp.where(scale > 0, scale, xp.ones_like(scale))


def _lengths(x: Array) -> Array:
    """Compute norms, 1 for a zero vector: ``(streams, n, dim)`` to ``(streams, n)``."""
    xp = array_namespace(x)
    norms = xp.sqrt(xp.vecdot(x, x))
    return xp.where(norms > 0, norms, xp.ones_like(norms))


def _one_minus_cosine(keys: Array, length: Array, anchor: Array) -> Array:
    """Compute ``1 - cos`` of the angle between keys and a direction: shape (streams, n); 1 where it overflows."""
    xp = array_namespace(keys)
    cosine = xp.matmul(keys, xp.matrix_transpose(anchor))[:, :, 0] / length
    return 1.0 - xp.where(xp.isfinite(cosine), cosine, xp.zeros_like(cosine))


def query_second_moment(keys: Array, queries: Quantized, scale: float | None) -> Array:
    """Compute the second moment of the queries in the window, with a ridge: the metric of differences of keys.

    In a stream without any query it is that of queries as long as the keys, in every direction alike.

    Parameters
    ----------
    keys : array, shape (streams, window, head_dim)
        In the dtype of storage.
    queries : Quantized, shape (streams, window, head_dim)
        Scaled; a scale of zero stands for no query.
    scale : float or None
        Softmax scale; ``None`` means ``head_dim ** -0.5``.

    Returns
    -------
    array, shape (streams, head_dim, head_dim)
        In the dtype to compute in.
    """
    wide = compute_dtype(keys)
    xp = array_namespace(keys)
    rows = dequantize(queries, wide)
    n_queries = xp.sum(xp.astype(queries.scales > 0, wide), axis=-1)[:, None, None]
    some = n_queries > 0
    identity = xp.eye(keys.shape[-1], dtype=wide, device=keys.device)[None, :, :]
    moment = xp.matmul(xp.matrix_transpose(rows), rows) / xp.where(some, n_queries, xp.ones_like(n_queries))
    mean_eigenvalue = xp.sum(moment * identity, axis=(1, 2), keepdims=True) / moment.shape[-1]
    with_ridge = moment + RULE.ridge * mean_eigenvalue * identity
    return xp.where(some, with_ridge, _isotropic(xp.astype(keys, wide, copy=False), scale) * identity)


def _isotropic(keys: Array, scale: float | None) -> Array:
    """Mean square of the logits of queries as long as the keys: shape (streams, 1, 1)."""
    xp = array_namespace(keys)
    factor = 1.0 / keys.shape[-1] if scale is None else scale * scale
    square = xp.mean(keys * keys, axis=(1, 2), keepdims=True)
    return factor * xp.where(square > 0, square, xp.ones_like(square))
