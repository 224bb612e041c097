"""The corrected estimator: what the means miss, from a sample of the tokens behind them, with a standard error.

A token j of cluster c stands for ``e^<q,k_j> v_j`` and is answered for by its share of the cluster,
``(w_c(q) / n_c) e^<q,mean_c> mean value_c``. The difference is its residual. Slots sample absorbed tokens uniformly,
with replacement; n times the mean over slots of the residuals is an unbiased estimate of all that the means miss, in
the numerator and in the denominator, and their variance estimates its error.

Exponentials have heavy tails: a sample that has missed the few tokens that matter looks better than it is. So the
variance of the slots is not believed below what the clusters themselves predict, from their spread.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .._array import Array, array_namespace, clip, positions
from ..reservoirs import drawn_places, latest, next_count, uniform_rounds
from ..reservoirs import replace as replace_slots
from .attend import half_variance, log_weights
from .state import Clusters, Residual

__all__ = ["correct", "empty_residual", "join_samples", "sample_tokens"]

# The corrected denominator is at least this share of the one it corrects: an estimate below is noise.
_LEAST_MASS = 0.1
# Logarithm of the largest weight of a slot, in units of the whole denominator: one beyond is noise of a token that
# was hardly ever to be sampled, and must not become infinite.
_LARGEST = 30.0


def empty_residual(keys: Array, values: Array, slots: int) -> Residual:
    """Return empty slots for streams like ``(streams, n, head_dim)`` and ``(streams, n, value_dim)``."""
    xp = array_namespace(keys)
    streams, device = keys.shape[0], keys.device
    return Residual(
        keys=xp.zeros((streams, slots, keys.shape[-1]), dtype=keys.dtype, device=device),
        values=xp.zeros((streams, slots, values.shape[-1]), dtype=keys.dtype, device=device),
        cluster=xp.zeros((streams, slots), dtype=xp.int32, device=device),
        due=xp.ones((streams, slots), dtype=xp.int64, device=device),
    )


def sample_tokens(
    residual: Residual,
    keys: Array,
    values: Array,
    cluster: Array,
    assignment: Array,
    before: int,
    key: tuple[Array, Array],
) -> Residual:
    """Offer a block of tokens to the slots, and follow the clusters of those held through their merges.

    Parameters
    ----------
    residual : Residual
    keys, values : array, shape (streams, n, dim)
    cluster : int64 array, shape (streams, n)
        Place of each token's cluster before the merges.
    assignment : int64 array, shape (streams, places)
        The new place of each cluster; see `subgen.default.merging.merge_closest`.
    before : int
        Tokens offered before.
    key : (int64 array, int64 array)
        Of the draws; each of shape (streams,), see ``subgen._random.stream_key``.

    Returns
    -------
    Residual
    """
    xp = array_namespace(keys)
    streams, n = cluster.shape
    order = xp.broadcast_to(positions(n, keys)[None, :], (streams, n))
    none = xp.zeros((streams, 1), dtype=xp.int64, device=keys.device)
    due, rounds = uniform_rounds(
        residual.due[:, None, :],
        none + before,
        order,
        none,
        none + n,
        (key[0][:, None, None], key[1][:, None, None]),
    )
    place = xp.astype(residual.cluster, xp.int64)
    kept = replace(residual, due=due[:, 0, :])
    if rounds:
        token = latest(rounds, n)[:, 0, :]
        place = replace_slots(place[:, :, None], cluster[:, :, None], token)[:, :, 0]
        kept = replace(
            kept,
            keys=replace_slots(residual.keys, keys, token),
            values=replace_slots(residual.values, values, token),
        )
    return replace(kept, cluster=xp.astype(xp.take_along_axis(assignment, place, axis=1), xp.int32))


def join_samples(
    first: Residual,
    second: Residual,
    keys: Array,
    values: Array,
    absorbed: tuple[int, int],
    before: int,
    places: Array,
    drawn: tuple[Array, Array],
) -> Residual:
    """Sample the tokens behind the clusters of two streams, the second after the first, and of tokens between them.

    Every slot chooses one of all those tokens uniformly. A token in between it takes; for one of a stream, it takes
    what the slot of that stream holds, which is uniform over its tokens. It is due as if replaced by the last token.

    Parameters
    ----------
    first, second : Residual
    keys, values : array, shape (streams, n, dim)
        The tokens in between.
    absorbed : (int, int)
        Tokens behind the clusters of the first and of the second.
    before : int
        Cluster slots of the first.
    places : int64 array, shape (streams, before + n + clusters of the second)
        Place of each cluster and of the cluster of each token in between.
    drawn : (int64 array, int64 array)
        Draws of each slot, to choose by and for the next replacement: ``(streams, slots)``.

    Returns
    -------
    Residual
    """
    xp = array_namespace(keys)
    n = keys.shape[1]
    total = xp.zeros_like(drawn[0]) + (absorbed[0] + n + absorbed[1])
    token = drawn_places(total, drawn[0]) - absorbed[0]
    of_first, of_second = token < 0, token >= n
    token = xp.where(of_first | of_second, xp.full_like(token, n), token)

    def chosen(a: Array, between: Array, b: Array) -> Array:
        held = xp.where(of_first[:, :, None], a, b)
        return replace_slots(held, between, token)

    def now(cluster: Array, skipped: int) -> Array:
        return xp.take_along_axis(places, xp.astype(cluster, xp.int64) + skipped, axis=1)[:, :, None]

    cluster = chosen(now(first.cluster, 0), places[:, before : before + n, None], now(second.cluster, before + n))[
        :, :, 0
    ]
    return Residual(
        keys=chosen(first.keys, keys, second.keys),
        values=chosen(first.values, values, second.values),
        cluster=xp.astype(cluster, xp.int32),
        due=next_count(total, drawn[1]),
    )


def correct(
    rows: Array, output: Array, logsumexp: Array, clusters: Clusters, residual: Residual, total: int
) -> tuple[Array, Array, Array]:
    """Add the estimate of what the means miss to an answer.

    Parameters
    ----------
    rows : array, shape (streams, m, head_dim)
        Scaled.
    output, logsumexp : array, shape (streams, m, value_dim) and (streams, m)
        The answer from the means and the exact pairs.
    clusters : Clusters
    residual : Residual
    total : int
        Tokens behind the clusters.

    Returns
    -------
    output : array, shape (streams, m, value_dim)
    error : array, shape (streams, m, value_dim)
        Standard error of each coordinate, by the delta method for a ratio of clusters.
    logsumexp : array, shape (streams, m)
    """
    xp = array_namespace(rows)
    wide = rows.dtype
    slots = residual.cluster.shape[1]
    log_total = math.log(total)
    place = xp.astype(residual.cluster, xp.int64)

    def of_slots(x: Array) -> Array:
        return xp.take_along_axis(x, place if x.ndim == 2 else place[:, :, None], axis=1)

    masses = log_weights(rows, clusters.counts, clusters.key_variance)
    logits = xp.matmul(rows, xp.matrix_transpose(clusters.keys)) - logsumexp[:, :, None]
    log_counts = _log(xp.astype(clusters.counts, wide))[:, None, :]
    # Logarithms of the exponentials of a member: as the cluster believes, and in truth; times n.
    member = masses - log_counts + logits + log_total
    believed = _exp(xp.take_along_axis(member, xp.broadcast_to(place[:, None, :], (*member.shape[:2], slots)), axis=2))
    keys, values = xp.astype(residual.keys, wide), xp.astype(residual.values, wide)
    truth = _exp(xp.matmul(rows, xp.matrix_transpose(keys)) - logsumexp[:, :, None] + log_total)
    mean_values = of_slots(clusters.values)
    missing = xp.mean(truth - believed, axis=-1, keepdims=True)
    mass = clip(1.0 + missing, _LEAST_MASS, None)
    added = (xp.matmul(truth, values) - xp.matmul(believed, mean_values)) / slots
    corrected = (output + added) / mass

    # Values in units of the largest that a row has to do with: their squares, times those of the largest weights, are
    # within float32 whatever the values.
    largest = xp.max(xp.abs(xp.concat([values, clusters.values], axis=1)), axis=(1, 2))[:, None, None]
    largest = xp.where(largest > 0, largest, xp.ones_like(largest))
    unit = xp.max(xp.abs(corrected), axis=-1, keepdims=True)
    unit = xp.where(unit > largest, unit, largest)[..., None]
    middle = corrected[:, :, None, :] / unit

    # Each slot's part in the ratio, coordinate by coordinate.
    part = truth[..., None] * (values[:, None, :, :] / unit - middle)
    part = part - believed[..., None] * (mean_values[:, None, :, :] / unit - middle)
    part = part - xp.mean(part, axis=2, keepdims=True)
    seen = xp.sum(part * part, axis=2) / max(1, slots - 1)

    # What the clusters predict: log-normal members with the variance of the spread, values independent of them.
    deviation = (values - mean_values) / largest
    within = xp.sum(deviation * deviation, axis=1, keepdims=True) / slots * (largest / unit[..., 0]) ** 2
    variance = 2.0 * half_variance(rows, clusters.key_variance)
    excess = xp.where(variance < log_counts, variance, xp.broadcast_to(log_counts, variance.shape))
    square = _exp(2.0 * (masses + logits) - log_counts + log_total + excess)
    several = xp.astype(clusters.counts > 1, wide)[:, None, :]
    square = square * several
    apart = square * (1.0 - xp.exp(-excess))
    offsets = clusters.values[:, None, :, :] / unit - middle
    predicted = xp.sum(apart[..., None] * offsets * offsets, axis=2)
    predicted = predicted + xp.sum(square, axis=2)[..., None] * within
    variance = xp.where(seen > predicted, seen, predicted) / slots
    return corrected, xp.sqrt(variance) * unit[..., 0] / mass, logsumexp + xp.log(mass[..., 0])


def _exp(logits: Array) -> Array:
    return array_namespace(logits).exp(clip(logits, None, _LARGEST))


def _log(counts: Array) -> Array:
    """Logarithm of a number of members; 0 where a place is free."""
    xp = array_namespace(counts)
    return xp.log(xp.where(counts > 0, counts, xp.ones_like(counts)))
