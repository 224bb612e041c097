"""Attention over clusters for a few rows compiled by numba: keys and values are each read once, without BLAS.

Numbers in 16 bits and int8 means are read without a copy. Used where numba is installed. Equal to
`subgen_numpy.attend` within the rounding of float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._numba_float16 import upcast, upcast_root, upcast_scale
from ._numba_streams import OPTIONS, SUMS, finish, take_next, view_at, wait

__all__ = ["ROWS", "Arguments", "attend"]

# Rows that share each load of a key and of a value; keys, and values, from as many places are read at once, which makes
# better use of memory than one after the other.
ROWS = 4

# Numbers compared at once.
_LANES = 16
_single = np.float32
# Weights below e^-88, the least normal number of float32, are zeros.
_LEAST = _single(-88.0296919)
_INFINITE = _single(np.inf)
_LOG2_E = _single(1.44269504)
# The logarithm of 2, in two parts of which the first has few digits.
_LOG_2, _LOG_2_REST = _single(0.693359375), _single(-2.12194440e-4)
# The bits of the square root of 1/2.
_ROOT_HALF = np.int32(0x3F3504F3)


class Arguments(NamedTuple):
    """What `attend` reads and writes.

    Attributes
    ----------
    tickets : int64 array, shape (2,)
        Zeros; the same for all threads.
    waits : bool
        Whether to wait for what other threads do.
    places : int64 array, shape (7, 2) or (9, 2)
        Addresses, see `subgen_numpy._numba_streams.view_at`:

        - scaled queries, float32, shape (streams, m, head_dim): m is a multiple of `ROWS`;
        - keys and values of the exact tokens, shape (streams, n, dim);
        - counts and key variance of the clusters, shape (streams, clusters) and (streams, clusters, 4);
        - mean keys and mean values, shape (streams, clusters, dim), as ``means``;
        - with int8 means, their scales, shape (streams, clusters).
    stored : array
        Of the dtype of keys, values, key variance and scales: float32, or words; see `subgen_numpy._float16`.
    means : array
        Of the dtype of means: as ``stored``, or int8.
    counts : int64 array
    m, n, clusters, dim : int
    outputs, logsumexp : float32 array, shape (streams, rows, value_dim) and (streams, rows)
        Written, of the first of the rows.
    """

    tickets: NDArray[np.int64]
    waits: bool
    places: NDArray[np.int64]
    stored: Any
    means: Any
    counts: NDArray[np.int64]
    m: int
    n: int
    clusters: int
    dim: int
    outputs: NDArray[np.float32]
    logsumexp: NDArray[np.float32]


@njit(**OPTIONS)
def attend(to: Any) -> None:
    """Attend over the clusters and exact tokens of each stream; several threads may do so at once.

    Parameters
    ----------
    to : Arguments
    """
    streams, value_dim = to.outputs.shape[0], to.outputs.shape[2]
    m, n, clusters, dim, places = to.m, to.n, to.clusters, to.dim, to.places
    quantized = places.shape[0] > 7
    logits, sums = np.empty((m, clusters + n), _single), np.empty((m, value_dim), _single)
    total, peak, energy = np.empty(m, _single), np.empty(m, _single), np.empty((m, 4), _single)
    log_counts = np.empty(clusters, _single)
    while True:
        s = take_next(to.tickets)
        if s >= streams:
            break
        rows = view_at(places, 0, s, (m, dim), to.outputs)
        _multiply(rows, view_at(places, 5, s, (clusters, dim), to.means), logits, 0)
        if quantized:
            _scale(logits, view_at(places, 7, s, (clusters,), to.stored))
        _multiply(rows, view_at(places, 1, s, (n, dim), to.stored), logits, clusters)
        _logarithms(view_at(places, 3, s, (clusters,), to.counts), log_counts)
        _find_energy(rows, energy)
        _add_masses(log_counts, energy, view_at(places, 4, s, (clusters, 4), to.stored), logits)
        _find_peaks(logits, peak)
        _exponentials(logits, peak)
        _add_up(logits, total)
        sums[:] = 0
        if quantized:
            _scale(logits, view_at(places, 8, s, (clusters,), to.stored))
        _weigh(logits, view_at(places, 6, s, (clusters, value_dim), to.means), sums, 0)
        _weigh(logits, view_at(places, 2, s, (n, value_dim), to.stored), sums, clusters)
        for i in range(to.logsumexp.shape[1]):
            # A row without any weight: an output of zero and a logsumexp of -inf.
            some = total[i] != 0
            to.logsumexp[s, i] = np.log(total[i]) + peak[i] if some else -_INFINITE
            share = 1 / total[i] if some else _single(0)
            for t in range(value_dim):
                to.outputs[s, i, t] = sums[i, t] * share
        finish(to.tickets)
    if to.waits:
        wait(to.tickets, streams)


@njit(**OPTIONS)
def _scale(numbers: Any, scales: Any) -> None:
    """Multiply the first numbers of each row."""
    for i in range(numbers.shape[0]):
        for j in range(scales.size):
            numbers[i, j] *= upcast_scale(scales[j])


@njit(fastmath=SUMS, **OPTIONS)
def _multiply(rows: Any, keys: Any, logits: Any, at: int) -> None:
    """Inner products of rows and keys, from a column on."""
    n, dim = keys.shape
    part = n // 4
    for i in range(0, rows.shape[0], ROWS):
        for j in range(part):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _single(0)
            c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = _single(0)
            for t in range(dim):
                a, b, c, d = rows[i, t], rows[i + 1, t], rows[i + 2, t], rows[i + 3, t]
                x = upcast(keys[j, t])
                a0, b0, c0, d0 = a0 + a * x, b0 + b * x, c0 + c * x, d0 + d * x
                x = upcast(keys[j + part, t])
                a1, b1, c1, d1 = a1 + a * x, b1 + b * x, c1 + c * x, d1 + d * x
                x = upcast(keys[j + 2 * part, t])
                a2, b2, c2, d2 = a2 + a * x, b2 + b * x, c2 + c * x, d2 + d * x
                x = upcast(keys[j + 3 * part, t])
                a3, b3, c3, d3 = a3 + a * x, b3 + b * x, c3 + c * x, d3 + d * x
            k = at + j
            logits[i, k], logits[i + 1, k], logits[i + 2, k], logits[i + 3, k] = a0, b0, c0, d0
            k += part
            logits[i, k], logits[i + 1, k], logits[i + 2, k], logits[i + 3, k] = a1, b1, c1, d1
            k += part
            logits[i, k], logits[i + 1, k], logits[i + 2, k], logits[i + 3, k] = a2, b2, c2, d2
            k += part
            logits[i, k], logits[i + 1, k], logits[i + 2, k], logits[i + 3, k] = a3, b3, c3, d3
        for k in range(4 * part, n):
            for r in range(i, i + ROWS):
                a0 = _single(0)
                for t in range(dim):
                    a0 += rows[r, t] * upcast(keys[k, t])
                logits[r, at + k] = a0


@njit(fastmath={"contract"}, **OPTIONS)
def _logarithms(counts: Any, logs: Any) -> None:
    """Compute logarithms of counts, -inf of 0.

    Powers of 2 are taken from their bits, and the rest is a polynomial (Cephes, `logf`), so that several are computed
    at once.
    """
    rest = np.empty(counts.size, _single)
    bits = rest.view(np.int32)
    for j in range(counts.size):
        rest[j] = _single(counts[j])
    for j in range(counts.size):
        two = (bits[j] - _ROOT_HALF) >> np.int32(23)
        logs[j] = _single(two)
        bits[j] -= two << np.int32(23)
    for j in range(counts.size):
        x = rest[j] - _single(1)
        y = _single(7.0376836292e-2) * x - _single(1.1514610310e-1)
        y = y * x + _single(1.1676998740e-1)
        y = y * x - _single(1.2420140846e-1)
        y = y * x + _single(1.4249322787e-1)
        y = y * x - _single(1.6668057665e-1)
        y = y * x + _single(2.0000714765e-1)
        y = y * x - _single(2.4999993993e-1)
        y = y * x + _single(3.3333331174e-1)
        y = y * x * (x * x) + logs[j] * _LOG_2_REST - _single(0.5) * (x * x)
        logs[j] = x + y + logs[j] * _LOG_2 if counts[j] > 0 else -_INFINITE


@njit(fastmath=SUMS, **OPTIONS)
def _find_energy(rows: Any, energy: Any) -> None:
    """Find half the squared length of each row in each band of coordinates, as many as key_variance has."""
    m, dim = rows.shape
    part = dim // 4
    for i in range(m):
        for band in range(4):
            whole = _single(0)
            for t in range(band * part, (band + 1) * part):
                whole += rows[i, t] * rows[i, t]
            energy[i, band] = _single(0.5) * whole


@njit(fastmath=SUMS, **OPTIONS)
def _add_masses(log_counts: Any, energy: Any, key_variance: Any, logits: Any) -> None:
    """Add the log-weights of clusters, ``log n + min(variance / 2, log n)``; see `subgen.default.attend`."""
    for i in range(0, logits.shape[0], ROWS):
        a0, a1, a2, a3 = energy[i, 0], energy[i, 1], energy[i, 2], energy[i, 3]
        b0, b1, b2, b3 = energy[i + 1, 0], energy[i + 1, 1], energy[i + 1, 2], energy[i + 1, 3]
        c0, c1, c2, c3 = energy[i + 2, 0], energy[i + 2, 1], energy[i + 2, 2], energy[i + 2, 3]
        d0, d1, d2, d3 = energy[i + 3, 0], energy[i + 3, 1], energy[i + 3, 2], energy[i + 3, 3]
        for j in range(log_counts.size):
            x0, x1, x2, x3 = (
                upcast_root(key_variance[j, 0]),
                upcast_root(key_variance[j, 1]),
                upcast_root(key_variance[j, 2]),
                upcast_root(key_variance[j, 3]),
            )
            a = a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
            b = b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
            c = c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
            d = d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
            most = log_counts[j]
            logits[i, j] += (most if most < a else a) + most
            logits[i + 1, j] += (most if most < b else b) + most
            logits[i + 2, j] += (most if most < c else c) + most
            logits[i + 3, j] += (most if most < d else d) + most


@njit(**OPTIONS)
def _find_peaks(logits: Any, peak: Any) -> None:
    """Find the largest logit of each row; 0 where there is none."""
    m, n = logits.shape
    lanes = np.empty(_LANES, _single)
    whole = n - n % _LANES
    for i in range(m):
        lanes[:] = -_INFINITE
        for j in range(0, whole, _LANES):
            for t in range(_LANES):
                lanes[t] = logits[i, j + t] if logits[i, j + t] > lanes[t] else lanes[t]
        most = -_INFINITE
        for t in range(_LANES):
            most = lanes[t] if lanes[t] > most else most
        for j in range(whole, n):
            most = logits[i, j] if logits[i, j] > most else most
        peak[i] = most if most > -_INFINITE else _single(0)


@njit(fastmath={"contract"}, **OPTIONS)
def _exponentials(logits: Any, peak: Any) -> None:
    """Turn logits into weights, the largest of each row 1.

    Powers of 2 are put together from their bits, and the rest is a polynomial (Cephes, `expf`), so that several are
    computed at once.
    """
    m, n = logits.shape
    bits = np.empty(n, np.int32)
    power = bits.view(_single)
    for i in range(m):
        for j in range(n):
            x = logits[i, j] - peak[i]
            x = _LEAST if x < _LEAST else x
            two = np.rint(x * _LOG2_E)
            x = (x - two * _LOG_2) - two * _LOG_2_REST
            y = _single(1.9875691500e-4) * x + _single(1.3981999507e-3)
            y = y * x + _single(8.3334519073e-3)
            y = y * x + _single(4.1665795894e-2)
            y = y * x + _single(1.6666665459e-1)
            y = y * x + _single(5.0000001201e-1)
            logits[i, j] = y * (x * x) + x + _single(1)
            bits[j] = (np.int32(two) + np.int32(127)) << np.int32(23)
        for j in range(n):
            logits[i, j] *= power[j]


@njit(fastmath=SUMS, **OPTIONS)
def _add_up(weights: Any, total: Any) -> None:
    """Sum up the weights of each row."""
    for i in range(weights.shape[0]):
        whole = _single(0)
        for j in range(weights.shape[1]):
            whole += weights[i, j]
        total[i] = whole


@njit(fastmath=SUMS, **OPTIONS)
def _weigh(weights: Any, values: Any, sums: Any, at: int) -> None:
    """Add values by their weights, which are from a column on."""
    n, dim = values.shape
    part = n // 4
    for i in range(0, weights.shape[0], ROWS):
        for j in range(part):
            k0, k1, k2, k3 = at + j, at + j + part, at + j + 2 * part, at + j + 3 * part
            a0, a1, a2, a3 = weights[i, k0], weights[i, k1], weights[i, k2], weights[i, k3]
            b0, b1, b2, b3 = weights[i + 1, k0], weights[i + 1, k1], weights[i + 1, k2], weights[i + 1, k3]
            c0, c1, c2, c3 = weights[i + 2, k0], weights[i + 2, k1], weights[i + 2, k2], weights[i + 2, k3]
            d0, d1, d2, d3 = weights[i + 3, k0], weights[i + 3, k1], weights[i + 3, k2], weights[i + 3, k3]
            k0, k1, k2, k3 = j, j + part, j + 2 * part, j + 3 * part
            for t in range(dim):
                v0, v1 = upcast(values[k0, t]), upcast(values[k1, t])
                v2, v3 = upcast(values[k2, t]), upcast(values[k3, t])
                sums[i, t] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                sums[i + 1, t] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                sums[i + 2, t] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
                sums[i + 3, t] += d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3
        for k in range(4 * part, n):
            for r in range(i, i + ROWS):
                a0 = weights[r, at + k]
                for t in range(dim):
                    sums[r, t] += a0 * upcast(values[k, t])
