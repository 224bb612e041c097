"""A whole prompt compressed at once: the distances of clusters are kept from merge to merge.

Data flow::

    queries, keys -> weights of tokens: dissimilar keys, and those that the last queries attend to, merge last
    tokens, a block at a time -> distances of the new from all  ->  rounds of merges until the budget is met
                                 (one metric for the prompt)         (distances follow by a formula)

`subgen.default.merging` computes all distances again for each half window, with the metric of that window. Here only
those of new tokens are computed. The distance of a merged cluster from any other follows from those of its two parts
(Lance and Williams 1967, for centroids), without their coordinates. So a token costs as many products as there are
clusters, and all merges of a block are chosen one after the other: a cluster that merged may merge again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .._array import Array, array_namespace, chunks, clip, compute_dtype, pieces, positions
from .._tree import concat, tree_map
from ..backends import operation
from ..softmax import scaled
from .merging import DIGITS, SAMPLED, band_means
from .metric import key_dissimilarity, mean_direction
from .state import Clusters

__all__ = ["Prompt", "agglomerate", "label_tokens", "prompt_blocks", "prompt_weights", "summarize"]

# Queries at the end of a prompt whose attention weights its tokens.
_LAST_QUERIES = 32
# Share of the mean attention that every token receives besides.
_LEAST_ATTENTION = 0.1
# Exponent of the distance from the end, which weights tokens where no queries are known.
_RECENCY = -0.25
# Tokens compared at once, at least. Few make the passes over distances dear, many the distances.
_LEAST_BLOCK = 128


def prompt_weights(keys: Array, queries: Array | None, scale: float, first: int, n_evicted: int) -> Array:
    """Weigh the tokens of a prompt that become clusters: heavy ones merge last.

    Parameters
    ----------
    keys : array, shape (streams, n, head_dim)
        Of the whole prompt.
    queries : array, shape (streams, group, n, head_dim), or None
        As they came.
    scale : float
        Softmax scale.
    first, n_evicted : int
        The tokens: so many, behind the first ones.

    Returns
    -------
    array, shape (streams, n_evicted)
        In the dtype to compute in, 1 in the mean: dissimilarity of the key (`subgen.default.metric.key_dissimilarity`)
        times the root of the attention that the last queries pay to the token.
    """
    xp, wide, n = array_namespace(keys), compute_dtype(keys), keys.shape[1]
    keys = xp.astype(keys, wide, copy=False)
    own = slice(first, first + n_evicted)
    behind = keys[:, first:, :]
    anchor, mean = mean_direction(behind, keys[:, :0, :], keys[:, :0, 0])
    weights = key_dissimilarity(keys[:, own, :], anchor, mean)
    if queries is None:
        distance = xp.astype(n - first - positions(n_evicted, keys), wide)
        weights = weights * distance[None, :] ** _RECENCY
    else:
        received = _received(keys, queries, scale)[:, own]
        average = xp.mean(received, axis=1, keepdims=True)
        relative = received / xp.where(average > 0, average, xp.ones_like(average))
        weights = weights * xp.sqrt(relative + _LEAST_ATTENTION)
    weights = weights / xp.mean(weights, axis=1, keepdims=True)
    # Whatever the numbers: logits beyond the dtype, NaN in keys that were not checked.
    return xp.where(xp.isfinite(weights) & (weights > 0), weights, xp.ones_like(weights))


def _received(keys: Array, queries: Array, scale: float) -> Array:
    """Average the attention of the last queries, each over the tokens up to its own: ``(streams, n)``."""
    xp, n = array_namespace(keys), keys.shape[1]
    size = min(n, _LAST_QUERIES)
    streams, group, _, head_dim = queries.shape
    rows = xp.reshape(scaled(queries[:, :, n - size :, :], scale), (streams, group * size, head_dim))
    logits = xp.matmul(rows, xp.matrix_transpose(keys))
    index = positions(n, keys)
    seen = index[None, :] <= index[n - size :, None]
    logits = xp.reshape(logits, (streams, group, size, n))
    logits = xp.where(seen[None, None, :, :], logits, xp.full_like(logits, -math.inf))
    weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    received = xp.mean(weights / xp.sum(weights, axis=-1, keepdims=True), axis=(1, 2))
    return xp.where(xp.isfinite(received), received, xp.zeros_like(received))


def _block_size(max_clusters: int) -> int:
    return max(_LEAST_BLOCK, max_clusters // 4)


def prompt_blocks(n: int, max_clusters: int) -> list[slice]:
    """Cut ``0 .. n`` into the blocks of tokens that `agglomerate` compares at once."""
    return chunks(n, _block_size(max_clusters))


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt that become clusters, and what distances and weights they have.

    Attributes
    ----------
    keys, values : array, shape (streams, n, dim)
        In float32 or float64.
    weights : array, shape (streams, n)
        Above zero.
    metric : array, shape (streams, head_dim, head_dim)
        Of differences of keys; see `subgen.default.merging.ward_costs`.
    value_scale : array, shape (streams,)
        Typical norm of a value.
    """

    keys: Array
    values: Array
    weights: Array
    metric: Array
    value_scale: Array


@operation
def agglomerate(prompt: Prompt, max_clusters: int) -> tuple[Clusters, Array]:
    """Merge tokens until ``max_clusters`` clusters are left in every stream.

    The criterion is that of `subgen.default.merging.ward_costs`; squared distances are those of means. A block of
    tokens is compared with all clusters; then the cheapest pair merges, and the next, until the surplus is gone.

    Parameters
    ----------
    prompt : Prompt
    max_clusters : int
        At least 1 and at most the number of tokens.

    Returns
    -------
    clusters : Clusters
        ``max_clusters`` of them, in the order of their first tokens.
    labels : int64 array, shape (streams, n)
        The cluster of each token.
    """
    labels = label_tokens(prompt, max_clusters)
    return summarize(prompt, labels, max_clusters), labels


def label_tokens(prompt: Prompt, max_clusters: int) -> Array:
    """Find the cluster of each token: int64, shape (streams, n); see `agglomerate`."""
    xp = array_namespace(prompt.keys)
    streams, n = prompt.weights.shape
    size = max_clusters + _block_size(max_clusters)
    parts = pieces(streams, size * size, prompt.keys)
    if len(parts) > 1:
        some = [tree_map(lambda x, part=part: x[part, ...], prompt) for part in parts]
        return concat([label_tokens(x, max_clusters) for x in some], axis=0)
    # Only differences matter: without the common offset, float32 keeps the digits.
    keys = prompt.keys - xp.mean(prompt.keys, axis=1, keepdims=True)
    values = prompt.values / prompt.value_scale[:, None, None]
    pool: _Pool | None = None
    labels = xp.zeros((streams, 0), dtype=xp.int64, device=keys.device)
    for part in prompt_blocks(n, max_clusters):
        weights = prompt.weights[:, part]
        pool = _joined(pool, keys[:, part, :], values[:, part, :], weights, prompt.metric)
        held = pool.weights.shape[1] - weights.shape[1]
        new = xp.broadcast_to(positions(weights.shape[1], keys)[None, :] + held, weights.shape)
        pool, places = _reduced(pool, max_clusters)
        labels = xp.take_along_axis(places, xp.concat([labels, new], axis=1), axis=1)
    return labels


@dataclass(frozen=True)
class _Pool:
    """Clusters, and what a merge of two depends on.

    Attributes
    ----------
    keys, values : array, shape (streams, clusters, dim)
        Means; values in units of their scale.
    counts, weights : array, shape (streams, clusters)
        In the dtype to compute in.
    squared : array, shape (streams, clusters, clusters)
        Distances, symmetric to the last bit; infinite on the diagonal and where a place is free.
    """

    keys: Array
    values: Array
    counts: Array
    weights: Array
    squared: Array


def _joined(pool: _Pool | None, keys: Array, values: Array, weights: Array, metric: Array) -> _Pool:
    """Put tokens behind clusters, with their distances from all."""
    xp = array_namespace(keys)
    old = 0 if pool is None else pool.keys.shape[1]
    all_keys, all_values = keys, values
    if pool is not None:
        all_keys, all_values = xp.concat([pool.keys, keys], axis=1), xp.concat([pool.values, values], axis=1)
    rows, lossy = _distances(all_keys, all_values, metric, old)
    if lossy is not None and bool(xp.any(lossy)):
        wide_keys, wide_values, wide_metric = (xp.astype(x, xp.float64) for x in (all_keys, all_values, metric))
        precise, _ = _distances(wide_keys, wide_values, wide_metric, old)
        rows = xp.where(lossy[:, None, None], xp.astype(precise, rows.dtype), rows)
    own = rows[:, :, old:]
    own = (own + xp.matrix_transpose(own)) * 0.5
    index = positions(own.shape[1], keys)
    own = xp.where((index[:, None] == index[None, :])[None, :, :], xp.full_like(own, math.inf), own)
    if pool is None:
        return _Pool(keys, values, xp.ones_like(weights), weights, own)
    between = rows[:, :, :old]
    above = xp.concat([pool.squared, xp.matrix_transpose(between)], axis=2)
    return _Pool(
        all_keys,
        all_values,
        xp.concat([pool.counts, xp.ones_like(weights)], axis=1),
        xp.concat([pool.weights, weights], axis=1),
        xp.concat([above, xp.concat([between, own], axis=2)], axis=1),
    )


def _distances(keys: Array, values: Array, metric: Array, old: int) -> tuple[Array, Array | None]:
    """Square the distances of those behind the old from all, and say where float32 loses them: bool, (streams,)."""
    xp = array_namespace(keys)
    mapped = xp.matmul(keys, metric)
    norms = xp.sum(mapped * keys, axis=-1) + xp.sum(values * values, axis=-1)
    products = xp.matmul(mapped[:, old:, :], xp.matrix_transpose(keys))
    products = products + xp.matmul(values[:, old:, :], xp.matrix_transpose(values))
    sums = norms[:, old:, None] + norms[:, None, :]
    squared = sums - 2.0 * products
    # Costs are kept finite, so that any two can merge.
    largest = float(xp.finfo(keys.dtype).max) ** 0.5
    squared = xp.where(squared > 0, clip(squared, None, largest), xp.zeros_like(squared))
    if keys.dtype == xp.float64:
        return squared, None
    # The nearest of a few, evenly spaced, as in `subgen.default.merging`.
    step, index = max(1, -(-squared.shape[1] // SAMPLED)), positions(keys.shape[1], keys)
    others = (index[old:, None] != index[None, :])[::step, :]
    lost = xp.any((squared[:, ::step, :] < DIGITS * sums[:, ::step, :]) & others[None, :, :], axis=-1)
    return squared, 2 * xp.sum(xp.astype(lost, xp.int64), axis=-1) > lost.shape[1]


def _reduced(pool: _Pool, max_clusters: int) -> tuple[_Pool, Array]:
    """Merge until so many are left; also give the new place of each: int64, shape (streams, clusters)."""
    xp = array_namespace(pool.keys)
    streams, n = pool.weights.shape
    index = positions(n, pool.keys)[None, :]
    root = xp.broadcast_to(index, (streams, n))
    gone = root < 0
    for _ in range(n - max_clusters):
        pool, first, second = _merged(pool)
        root = xp.where(root == second, first, root)
        gone = gone | (index == second)
    if n <= max_clusters:
        return pool, root
    order = xp.argsort(xp.astype(gone, xp.int8), axis=-1, stable=True)
    places = xp.take_along_axis(xp.argsort(order, axis=-1, stable=True), root, axis=1)
    left = order[:, :max_clusters]
    pool = tree_map(lambda x: xp.take_along_axis(x, left, axis=1) if x.ndim == 2 else _rows(x, left), pool)
    # Of symmetric rows the columns: rows of the transpose, which is symmetric again.
    return replace(pool, squared=_rows(xp.matrix_transpose(pool.squared), left)), places


def _rows(x: Array, places: Array) -> Array:
    """Take rows of each stream: ``(streams, n, dim)`` by int64 ``(streams, m)``; as whole rows, which NumPy copies."""
    xp = array_namespace(x)
    (streams, n, dim), m = x.shape, places.shape[1]
    flat = xp.reshape(places + n * positions(streams, x)[:, None], (streams * m,))
    return xp.reshape(xp.take(xp.reshape(x, (streams * n, dim)), flat, axis=0), (streams, m, dim))


def _merged(pool: _Pool) -> tuple[_Pool, Array, Array]:
    """Merge the cheapest pair of each stream, of equal ones the first.

    Returns
    -------
    pool : _Pool
        The joint cluster where the first was, a free place where the second was.
    first, second : int64 array, shape (streams, 1)
    """
    xp = array_namespace(pool.keys)
    n = pool.weights.shape[1]
    index = positions(n, pool.keys)[None, :]
    inverse = 1.0 / pool.weights
    costs = pool.squared / (inverse[:, :, None] + inverse[:, None, :])
    pair = xp.argmin(xp.reshape(costs, (costs.shape[0], n * n)), axis=-1)[:, None]
    first, second = pair // n, pair % n
    first_counts, second_counts = (xp.take_along_axis(pool.counts, x, axis=1) for x in (first, second))
    counts = first_counts + second_counts
    share = 1.0 - first_counts / counts
    one, other = (_rows(pool.squared, x)[:, 0, :] for x in (first, second))
    row = (1.0 - share) * one + share * other - share * (1.0 - share) * xp.take_along_axis(one, second, axis=1)
    row = xp.where(row > 0, row, xp.zeros_like(row))
    here, free = index == first, index == second
    row = xp.where(here | free, xp.full_like(row, math.inf), row)
    squared = xp.where(here[:, :, None], row[:, None, :], pool.squared)
    squared = xp.where(here[:, None, :], row[:, :, None], squared)
    squared = xp.where(free[:, :, None] | free[:, None, :], xp.full_like(squared, math.inf), squared)

    def mean(x: Array) -> Array:
        one, other = _rows(x, first), _rows(x, second)
        return xp.where(here[:, :, None], one + (other - one) * share[:, :, None], x)

    added = xp.where(here, xp.take_along_axis(pool.weights, second, axis=1), xp.zeros_like(pool.weights))
    return (
        _Pool(
            mean(pool.keys),
            mean(pool.values),
            xp.where(here, counts, pool.counts),
            pool.weights + added,
            squared,
        ),
        first,
        second,
    )


def summarize(prompt: Prompt, labels: Array, n_clusters: int) -> Clusters:
    """Describe clusters of tokens by their means, counts, key variances and weights.

    Parameters
    ----------
    prompt : Prompt
    labels : int64 array, shape (streams, n)
        The cluster of each token, each from 0 to ``n_clusters - 1``; none is empty.
    n_clusters : int

    Returns
    -------
    Clusters
    """
    keys, values, weights = prompt.keys, prompt.values, prompt.weights
    xp = array_namespace(keys)
    streams, n = labels.shape
    index = positions(n_clusters, keys)
    sums = [xp.zeros((streams, n_clusters, x.shape[-1]), dtype=x.dtype, device=x.device) for x in (keys, values)]
    counts, weight = (xp.zeros((streams, n_clusters), dtype=keys.dtype, device=keys.device) for _ in range(2))
    parts = pieces(n, streams * n_clusters, keys)
    for part in parts:
        of_cluster = xp.astype(index[None, :, None] == labels[:, None, part], keys.dtype)
        sums = [s + xp.matmul(of_cluster, x[:, part, :]) for s, x in zip(sums, (keys, values), strict=True)]
        counts = counts + xp.sum(of_cluster, axis=-1)
        weight = weight + xp.matmul(of_cluster, weights[:, part, None])[:, :, 0]
    mean_keys, mean_values = (s / counts[:, :, None] for s in sums)
    difference = keys - xp.take_along_axis(mean_keys, labels[:, :, None], axis=1)
    apart = band_means(difference * difference)
    variance = xp.zeros((streams, n_clusters, apart.shape[-1]), dtype=keys.dtype, device=keys.device)
    for part in parts:
        of_cluster = xp.astype(index[None, :, None] == labels[:, None, part], keys.dtype)
        variance = variance + xp.matmul(of_cluster, apart[:, part, :])
    return Clusters(
        keys=mean_keys,
        values=mean_values,
        counts=xp.astype(counts, xp.int64),
        key_variance=variance / counts[:, :, None],
        importance=weight,
        leaders=None,
    )
