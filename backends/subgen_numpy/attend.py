"""Weighted attention, and attention from a state, each in one buffer of logits.

The few rows of a token take one pass over keys and values in compiled loops, streams in several threads, where numba is
installed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen.default.merging import band_means
from subgen.default.quantization import dequantize
from subgen.default.state import Clusters, Quantized, State
from subgen.softmax import causal_bias

from ._float16 import LIMITS, from_roots, like, upcast, upcast_scales
from ._numba import addresses, compiled
from ._parallel import parallel_for

__all__ = ["attend", "upcast_means", "weighted_attention"]

Floats = NDArray[np.floating[Any]]

# Up to this many rows the product with keys on the left is the faster one, several times so for a few.
_FEW_ROWS = 32
# Numbers that are worth a thread: reading them takes several times as long as waking it up, and hardly less in int8.
_WORTH_A_THREAD = 2**19


def weighted_attention(queries: Floats, keys: Floats, values: Floats, log_weights: Floats) -> tuple[Floats, Floats]:
    """Compute weighted softmax attention; see `subgen.softmax.weighted_attention`."""
    logits = np.empty((*queries.shape[:2], keys.shape[1]), queries.dtype)
    _multiply(queries, keys, logits)
    logits += log_weights
    return _softmax(logits, [values])


def attend(state: State, rows: Floats, causal: int = 0) -> tuple[Floats, Floats]:
    """Answer scaled queries from a state; see `subgen.default.attend.attend`."""
    clusters, n = state.clusters, state.exact.n
    keys, values = state.exact.keys[:, :n], state.exact.values[:, :n]
    few = rows.shape[1] <= _FEW_ROWS and causal <= 1 and rows.dtype == np.float32
    loops = compiled("attend") if few and clusters.key_variance.shape[-1] == 4 else None
    if loops is not None:
        return _attend_by_loops(loops, rows, keys, values, clusters)
    c = clusters.counts.shape[1]
    logits = np.empty((*rows.shape[:2], c + n), rows.dtype)
    _multiply(rows, upcast(keys, rows.dtype), logits[:, :, c:])
    if causal > 1:  # one token sees all
        by_head = logits.reshape(rows.shape[0], -1, causal, c + n)
        by_head[..., c:] += causal_bias(causal, n, 1, rows)
    if not c:
        return _softmax(logits, [upcast(values, rows.dtype)])
    mean_keys, mean_values = (upcast_means(x, rows.dtype) for x in (clusters.keys, clusters.values))
    key_variance = from_roots(clusters.key_variance, rows.dtype)
    _multiply(rows, mean_keys, logits[:, :, :c])
    energy = band_means(rows * rows)
    energy *= rows.dtype.type(0.5 * rows.shape[-1] / key_variance.shape[-1])
    # Free places: the logarithm of 0 is -inf, the smaller of the two is, and so is the sum.
    with np.errstate(divide="ignore"):
        log_counts = np.log(clusters.counts.astype(rows.dtype))
    half = np.empty((*rows.shape[:2], c), rows.dtype)
    _multiply(energy, key_variance, half)
    np.minimum(half, log_counts[:, None, :], out=half)
    half += log_counts[:, None, :]
    logits[:, :, :c] += half
    return _softmax(logits, [mean_values, upcast(values, rows.dtype)])


def upcast_means(x: Floats | Quantized, dtype: Any) -> Floats:
    """Cast what is stored to the dtype to compute in."""
    if isinstance(x, Quantized):
        vectors: Floats = dequantize(Quantized(x.codes, upcast_scales(x.scales, dtype)), dtype)
        return vectors
    return upcast(x, dtype)


def _attend_by_loops(
    loops: ModuleType, rows: Floats, keys: Floats, values: Floats, clusters: Clusters
) -> tuple[Floats, Floats]:
    """Attend by compiled loops, streams in threads; see `subgen_numpy._numba_attend`."""
    streams, m, dim = rows.shape
    quantized = isinstance(clusters.keys, Quantized)
    means = [clusters.keys, clusters.values]
    codes, scales = ([x.codes for x in means], [x.scales for x in means]) if quantized else ([], [])
    stored, key_variance = [keys, values, *([] if quantized else means)], clusters.key_variance
    dtype = keys.dtype if keys.dtype in LIMITS else rows.dtype
    if any(x.dtype != dtype for x in (*stored, key_variance, *scales)):
        dtype = rows.dtype
        stored, scales = [upcast(x, dtype) for x in stored], [upcast_scales(x, dtype) for x in scales]
        key_variance = from_roots(key_variance, dtype)
    keys, values, *means = stored
    outputs, logsumexp = np.empty((streams, m, values.shape[-1]), rows.dtype), np.empty((streams, m), rows.dtype)
    if m % loops.ROWS:
        rows = _filled_up(rows, m + -m % loops.ROWS)
    places, kept = addresses(rows, keys, values, clusters.counts, key_variance, *codes, *means, *scales)
    kind = like(dtype)
    shared = (
        *(places, kind, like(np.int8) if quantized else kind, like(np.int64)),
        *(rows.shape[1], keys.shape[1], clusters.counts.shape[1], dim, outputs, logsumexp),
    )

    # The arrays must live as long as a thread may come.
    def work(tickets: NDArray[np.int64], waits: bool, _: object = kept) -> None:
        loops.attend(loops.Arguments(tickets, waits, *shared))

    numbers = sum(x.size for x in (keys, values, *(codes or means)))
    parallel_for(work, min(streams, numbers // _WORTH_A_THREAD))
    return outputs, logsumexp


def _filled_up(x: Floats, m: int) -> Floats:
    """Return as many rows, zeros behind those there are."""
    filled = np.zeros((x.shape[0], m, x.shape[2]), x.dtype)
    filled[:, : x.shape[1]] = x
    return filled


def _multiply(rows: Floats, others: Floats, to: Floats) -> None:
    """Write the inner products ``(streams, m, n)``, in the dtype of the rows."""
    others = others.astype(rows.dtype, copy=False)
    if rows.shape[1] > _FEW_ROWS:
        np.matmul(rows, others.swapaxes(-1, -2), out=to)
    else:
        to[...] = (others @ np.ascontiguousarray(rows.swapaxes(-1, -2))).swapaxes(-1, -2)


def _softmax(logits: Floats, values: list[Floats]) -> tuple[Floats, Floats]:
    """Compute outputs and logsumexp, from values for consecutive columns; writes into the logits."""
    peak = logits.max(axis=-1, keepdims=True)
    peak[np.isneginf(peak)] = 0.0
    logits -= peak
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)
    first = values[0].shape[1]
    outputs = logits[:, :, :first] @ values[0].astype(logits.dtype, copy=False)
    if len(values) > 1:
        outputs += logits[:, :, first:] @ values[1]
    # Rows without any weight: an output of zero and a logsumexp of -inf, without a warning.
    empty = total == 0.0
    outputs /= np.where(empty, logits.dtype.type(1.0), total)
    with np.errstate(divide="ignore"):
        logsumexp = np.log(total) + peak
    return outputs, logsumexp[..., 0]
