"""Weighted attention in one buffer of logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["weighted_attention"]

Floats = NDArray[np.floating[Any]]


def weighted_attention(queries: Floats, keys: Floats, values: Floats, log_weights: Floats) -> tuple[Floats, Floats]:
    """Weighted softmax attention; see `subgen.weighted.weighted_attention`."""
    dtype = queries.dtype
    logits = queries @ keys.astype(dtype, copy=False).swapaxes(-1, -2)
    logits += log_weights
    peak = logits.max(axis=-1, keepdims=True)
    peak[np.isneginf(peak)] = 0.0
    logits -= peak
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)
    outputs = logits @ values.astype(dtype, copy=False)
    # Rows without any weight: an output of zero and a logsumexp of -inf, without a warning.
    empty = total == 0.0
    outputs /= np.where(empty, dtype.type(1.0), total)
    with np.errstate(divide="ignore"):
        logsumexp = np.log(total) + peak
    return outputs, logsumexp[..., 0]
