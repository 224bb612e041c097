"""Attention over clusters for a few rows compiled by numba: keys and values are each read once, and BLAS is not asked.

Numbers in 16 bits, and means in 8, are read as they are. Used where numba is installed. Equal to
`subgen_numpy._attention` within the rounding of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ._compiled_streams import OPTIONS, SUMS, finish, in_memory, take_next, wait
from ._compiled_words import widen, widen_root, widen_scale

__all__ = ["ROWS", "answer"]

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


@njit(**OPTIONS)
def answer(
    turns: Any,
    waits: Any,
    places: Any,
    integers: Any,
    codes: Any,
    stored: Any,
    m: int,
    n: int,
    clusters: int,
    dim: int,
    outputs: Any,
    logsumexp: Any,
) -> None:
    """Attend over the clusters and exact pairs of each stream; several threads may do so at once.

    Parameters
    ----------
    turns : int64 array, shape (2,)
        Zeros; the same for all threads.
    waits : bool
        Whether to wait for what others do.
    places : int64 array, shape (5, 2) or (9, 2)
        Where there are, see `subgen_numpy._compiled_streams.in_memory`:

        - scaled queries, float32, shape (streams, m, head_dim): m is a multiple of `ROWS`;
        - keys, shape (streams, n, head_dim): the clusters come first;
        - values, shape (streams, n, value_dim);
        - counts, int64, shape (streams, clusters): 0 where a place is free;
        - spread, shape (streams, clusters, 4): see `subgen.merging.Means`.

        With means in 8 bits, keys and values are those of the n exact pairs alone, and behind these there are, of the
        clusters, codes of keys and of values, int8, shape (streams, clusters, dim), and their scales,
        shape (streams, clusters).
    integers : int64 array
    codes : int8 array
    stored : array
        Of the dtype of keys, values, spread and scales: float32, or words; see `subgen_numpy._words`.
    m, n, clusters, dim : int
    outputs, logsumexp : float32 array, shape (streams, rows, value_dim) and (streams, rows)
        Written, of the first of the rows.
    """
    streams, value_dim = outputs.shape[0], outputs.shape[2]
    coded = places.shape[0] > 5
    at = clusters if coded else 0
    logits, sums = np.empty((m, at + n), _single), np.empty((m, value_dim), _single)
    total, peak, energy = np.empty(m, _single), np.empty(m, _single), np.empty((m, 4), _single)
    log_counts = np.empty(clusters, _single)
    while True:
        s = take_next(turns)
        if s >= streams:
            break
        rows = in_memory(places, 0, s, (m, dim), outputs)
        if coded:
            _multiply(rows, in_memory(places, 5, s, (clusters, dim), codes), logits, 0)
            _scale(logits, in_memory(places, 7, s, (clusters,), stored))
        _multiply(rows, in_memory(places, 1, s, (n, dim), stored), logits, at)
        _logarithms(in_memory(places, 3, s, (clusters,), integers), log_counts)
        _find_energy(rows, energy)
        _add_masses(log_counts, energy, in_memory(places, 4, s, (clusters, 4), stored), logits)
        _find_peaks(logits, peak)
        _exponentials(logits, peak)
        _add_up(logits, total)
        sums[:] = 0
        if coded:
            _scale(logits, in_memory(places, 8, s, (clusters,), stored))
            _weigh(logits, in_memory(places, 6, s, (clusters, value_dim), codes), sums, 0)
        _weigh(logits, in_memory(places, 2, s, (n, value_dim), stored), sums, at)
        for i in range(logsumexp.shape[1]):
            # A row without any weight: an output of zero and a logsumexp of -inf.
            some = total[i] != 0
            logsumexp[s, i] = np.log(total[i]) + peak[i] if some else -_INFINITE
            share = 1 / total[i] if some else _single(0)
            for t in range(sums.shape[1]):
                outputs[s, i, t] = sums[i, t] * share
        finish(turns)
    if waits:
        wait(turns, streams)


@njit(**OPTIONS)
def _scale(numbers: Any, scales: Any) -> None:
    """Multiply the first numbers of each row."""
    for i in range(numbers.shape[0]):
        for j in range(scales.size):
            numbers[i, j] *= widen_scale(scales[j])


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
                x = widen(keys[j, t])
                a0, b0, c0, d0 = a0 + a * x, b0 + b * x, c0 + c * x, d0 + d * x
                x = widen(keys[j + part, t])
                a1, b1, c1, d1 = a1 + a * x, b1 + b * x, c1 + c * x, d1 + d * x
                x = widen(keys[j + 2 * part, t])
                a2, b2, c2, d2 = a2 + a * x, b2 + b * x, c2 + c * x, d2 + d * x
                x = widen(keys[j + 3 * part, t])
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
                    a0 += rows[r, t] * widen(keys[k, t])
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
    """Find half the squared length of each row in each band of coordinates, as many as spread has."""
    m, dim = rows.shape
    part = dim // 4
    for i in range(m):
        for band in range(4):
            whole = _single(0)
            for t in range(band * part, (band + 1) * part):
                whole += rows[i, t] * rows[i, t]
            energy[i, band] = _single(0.5) * whole


@njit(fastmath=SUMS, **OPTIONS)
def _add_masses(log_counts: Any, energy: Any, spread: Any, logits: Any) -> None:
    """Add the log-weights of clusters, ``log n + min(variance / 2, log n)``; see `subgen.mass.log_weights`."""
    for i in range(0, logits.shape[0], ROWS):
        a0, a1, a2, a3 = energy[i, 0], energy[i, 1], energy[i, 2], energy[i, 3]
        b0, b1, b2, b3 = energy[i + 1, 0], energy[i + 1, 1], energy[i + 1, 2], energy[i + 1, 3]
        c0, c1, c2, c3 = energy[i + 2, 0], energy[i + 2, 1], energy[i + 2, 2], energy[i + 2, 3]
        d0, d1, d2, d3 = energy[i + 3, 0], energy[i + 3, 1], energy[i + 3, 2], energy[i + 3, 3]
        for j in range(log_counts.size):
            x0, x1 = widen_root(spread[j, 0]), widen_root(spread[j, 1])
            x2, x3 = widen_root(spread[j, 2]), widen_root(spread[j, 3])
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
                v0, v1 = widen(values[k0, t]), widen(values[k1, t])
                v2, v3 = widen(values[k2, t]), widen(values[k3, t])
                sums[i, t] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                sums[i + 1, t] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                sums[i + 2, t] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
                sums[i + 3, t] += d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3
        for k in range(4 * part, n):
            for r in range(i, i + ROWS):
                a0 = weights[r, at + k]
                for t in range(dim):
                    sums[r, t] += a0 * widen(values[k, t])
