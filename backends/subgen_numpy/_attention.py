"""Weighted attention, and attention over clusters, each in one buffer of logits.

The few rows of a token take one pass over keys and values in compiled loops, streams in several threads, where numba is
installed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen import mass
from subgen.merging import band_means
from subgen.rounding import Codes
from subgen.weighted import causal_bias

from ._compiled import compiled, in_memory
from ._threads import helped
from ._words import LIMITS, from_roots, like, widened, widened_scales

__all__ = ["coded_attention", "sketch_attention", "weighted_attention"]

Floats = NDArray[np.floating[Any]]

# Up to this many rows the product with keys on the left is the faster one, several times so for a few.
_FEW_ROWS = 32
# Numbers that are worth a thread: reading them takes several times as long as waking it up, and of 8 bits hardly less.
_WORTH_A_THREAD = 2**19


def weighted_attention(queries: Floats, keys: Floats, values: Floats, log_weights: Floats) -> tuple[Floats, Floats]:
    """Weighted softmax attention; see `subgen.weighted.weighted_attention`."""
    logits = _products(queries, keys)
    logits += log_weights
    return _softmax(logits, values)


def sketch_attention(
    rows: Floats,
    keys: Floats,
    values: Floats,
    counts: NDArray[np.int64],
    spread: Floats,
    causal: int = 0,
    weighted: Callable[..., tuple[Floats, Floats]] = weighted_attention,
) -> tuple[Floats, Floats]:
    """Attention over clusters, and over exact pairs behind them; see `subgen.mass.sketch_attention`.

    Log-weights go into the logits where they lie, and ``weighted`` is not called.
    """
    m, clusters = rows.shape[1], counts.shape[1]
    loops = _loops_for(rows, spread, causal)
    if loops is not None:
        return _answers(loops, rows, keys, values, counts, spread)
    keys, values = (widened(x, rows.dtype) for x in (keys, values))
    spread = from_roots(spread, rows.dtype)
    logits = _products(rows, keys)
    if clusters:
        energy = band_means(rows * rows)
        energy *= rows.dtype.type(0.5 * rows.shape[-1] / spread.shape[-1])
        # Free places: the logarithm of 0 is -inf, the smaller of the two is, and so is the sum.
        with np.errstate(divide="ignore"):
            log_counts = np.log(counts, dtype=rows.dtype)
        half = _products(energy, spread)
        np.minimum(half, log_counts[:, None, :], out=half)
        half += log_counts[:, None, :]
        logits[:, :, :clusters] += half
    if causal > 1:  # one token sees all that is held
        by_head = logits.reshape(rows.shape[0], m // causal, causal, -1)
        by_head[..., clusters:] += causal_bias(causal, keys.shape[1] - clusters, 1, rows)
    return _softmax(logits, values)


def coded_attention(
    rows: Floats,
    keys: Floats,
    values: Floats,
    counts: NDArray[np.int64],
    spread: Floats,
    key_codes: Codes,
    value_codes: Codes,
    causal: int,
    ops: Any,
) -> tuple[Floats, Floats]:
    """Attention over clusters in 8 bits, and over exact pairs; see `subgen.mass.coded_attention`.

    The few rows of a token take one pass over codes and exact pairs in compiled loops, where numba is installed.
    """
    loops = _loops_for(rows, spread, causal)
    if loops is None:
        key_codes, value_codes = (
            Codes(x.codes, widened_scales(x.scales, rows.dtype)) for x in (key_codes, value_codes)
        )
        spread = from_roots(spread, rows.dtype)
        return mass.coded_attention(rows, keys, values, counts, spread, key_codes, value_codes, causal, ops)
    return _answers(loops, rows, keys, values, counts, spread, (key_codes, value_codes))


def _loops_for(rows: Floats, spread: Floats, causal: int) -> ModuleType | None:
    """Return the compiled loops, if they answer such rows."""
    few = rows.shape[1] <= _FEW_ROWS and causal <= 1 and rows.dtype == np.float32 and spread.shape[-1] == 4
    return compiled("attention") if few else None


def _answers(
    loops: ModuleType,
    rows: Floats,
    keys: Floats,
    values: Floats,
    counts: NDArray[np.int64],
    spread: Floats,
    coded: tuple[Codes, ...] = (),
) -> tuple[Floats, Floats]:
    """Attend by compiled loops, streams in threads; see `answer` of `subgen_numpy._compiled_attention`."""
    streams, m, _ = rows.shape
    scales = [x.scales for x in coded]
    dtype = keys.dtype if keys.dtype in LIMITS else rows.dtype
    if any(x.dtype != dtype for x in (keys, values, spread, *scales)):
        dtype = rows.dtype
        keys, values = widened(keys, dtype), widened(values, dtype)
        spread, scales = from_roots(spread, dtype), [widened_scales(x, dtype) for x in scales]
    outputs = np.empty((streams, m, values.shape[-1]), rows.dtype)
    logsumexp = np.empty((streams, m), rows.dtype)
    if m % loops.ROWS:
        rows = _filled_up(rows, m + -m % loops.ROWS)
    codes = [x.codes for x in coded]
    places, arrays = in_memory(rows, keys, values, counts.astype(np.int64, copy=False), spread, *codes, *scales)
    kinds = like(np.int64), like(np.int8), like(dtype)
    sizes = rows.shape[1], keys.shape[1], counts.shape[1], rows.shape[2]

    # The arrays are there as long as a thread may come.
    def answer(turns: NDArray[np.int64], waits: bool, _: object = arrays) -> None:
        loops.answer(turns, waits, places, *kinds, *sizes, outputs, logsumexp)

    helped(answer, min(streams, sum(x.size for x in (keys, values, *codes)) // _WORTH_A_THREAD))
    return outputs, logsumexp


def _filled_up(x: Floats, m: int) -> Floats:
    """Return as many rows, zeros behind those there are."""
    filled = np.zeros((x.shape[0], m, x.shape[2]), x.dtype)
    filled[:, : x.shape[1]] = x
    return filled


def _products(rows: Floats, others: Floats) -> Floats:
    """Inner products ``(streams, m, n)`` in the dtype of the rows."""
    others = others.astype(rows.dtype, copy=False)
    if rows.shape[1] > _FEW_ROWS:
        return rows @ others.swapaxes(-1, -2)
    return np.ascontiguousarray((others @ np.ascontiguousarray(rows.swapaxes(-1, -2))).swapaxes(-1, -2))


def _softmax(logits: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Outputs and logsumexp; writes into the logits."""
    peak = logits.max(axis=-1, keepdims=True)
    peak[np.isneginf(peak)] = 0.0
    logits -= peak
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)
    outputs = logits @ values.astype(logits.dtype, copy=False)
    # Rows without any weight: an output of zero and a logsumexp of -inf, without a warning.
    empty = total == 0.0
    outputs /= np.where(empty, logits.dtype.type(1.0), total)
    with np.errstate(divide="ignore"):
        logsumexp = np.log(total) + peak
    return outputs, logsumexp[..., 0]
